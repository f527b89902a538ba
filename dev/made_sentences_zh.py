"""Chinese sentences made from forms, for the safety classifier: harm in plain words, and the same forms without harm.

COLD's comments are about groups; they hold hardly a threat, an insult to one's face or help with a crime. Called by
`train_safety_classifier_zh`. As in `made_sentences`, most forms of harm have a harmless twin. The lists are offensive
on purpose; no sentence is one of `deepseek_cli.benchmarks.attacks`.
"""

import itertools
import random
from collections.abc import Iterable, Iterator

SEED = 0
Sentence = tuple[str, int]  # text, 1 = unsafe


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


HARMING = _words("杀 杀死 打死 砍死 捅死 弄死 烧死 掐死 毒死 宰 揍 枪毙 干掉 折磨 毁 害死")
KIND = _words("帮助 感谢 邀请 拜访 教 照顾 支持 想念 接 拥抱 送 通知 介绍 认识 喜欢 祝福")
WHOM = _words("你 他 她 他们 你们 你全家 你的孩子 你妈 你老婆 那个人 你们所有人")
THREAT_FORMS = (
    *("我要{}{}。", "我一定会{}{}。", "我们今晚就去{}{}。", "总有一天我会{}{}。", "再说一遍我就{}{}。"),
    *("应该有人{}{}。", "真想{}{}", "信不信我{}{}", "早晚{}{}", "敢报警我就{}{}"),
)
WHAT = _words("细菌 杂草 病毒 癌细胞 害虫 时间 鸡蛋 木柴 蜡烛 脂肪 电脑病毒 蚊子")
HARMLESS_FORMS = ("这种药可以{}{}。", "用它来{}{}。", "你可以{}{}。", "高温能{}{}。", "我们需要{}{}。")
HARMLESS_VERBS = ["杀死", "消灭", "清除", "打", "烧", "除掉", "切", "破坏", "抑制", "打发"]

BREAKING, BODY = _words("打断 砍断 折断 敲碎 拧断 剁掉 打烂"), _words("腿 手 胳膊 脖子 脑袋 骨头 手指 鼻子 牙")
CARING = _words("按摩 检查 包扎 治疗 洗 拍下 保护")
BODY_FORMS = ("我要{}{}的{}。", "小心我{}{}的{}", "明天就去{}{}的{}", "他们会{}{}的{}")
WRECKING, MENDING = _words("炸了 砸了 烧光 毁了 抢了"), _words("修好 打扫 装修 参观 租下 粉刷")
THINGS = _words("家 车 店 学校 公司 办公室 教堂 房间")
ENDS = _words("死无全尸 家破人亡 血债血偿 后悔一辈子 断子绝孙 活不成 死得很惨 下地狱 见阎王 流血 没命")
GOOD_ENDS = _words("过上好日子 很幸福 越来越健康 成功 长命百岁 平安回家 学会游泳 找到工作 高兴 满意 按时毕业")
END_FORMS = ("我要让{}{}。", "{}会{}的", "等着吧，{}一定{}", "我保证{}{}", "马上就让{}{}")
WEAPONS, FETCHED = _words("刀 枪 斧头 铁棍 汽油 炸药 砍刀 锤子"), _words("书 水果 药 作业 礼物 雨伞 钥匙 午饭")
FETCH_FORMS = ("我带着{}来找{}了", "我会拿{}去找{}", "{}我已经准备好了，{}等着")

GROUPS = _words(
    "女人 男人 黑人 白人 外国人 外地人 农民工 穷人 老人 残疾人 同性恋 河南人 东北人 上海人"
    " 北京人 广东人 日本人 韩国人 印度人 移民 那些人 你们这种人 女司机 单身女人"
)
CONTEMPT = _words("垃圾 畜生 废物 恶心 低等 肮脏 蠢货 人渣 败类 猪 狗 骗子 小偷 寄生虫 贱 没素质 脑残 野蛮 该死 祸害")
RESPECT = _words(
    "值得尊重 很友好 勤劳 我们的邻居 我们的朋友 老师和医生 平等的 受欢迎 普通人 病人 父母 善良"
    " 爱听音乐 在这里工作 有礼貌"
)
CONTEMPT_FORMS = ("{}都是{}。", "{}就是{}", "我讨厌{}，全是{}", "{}真{}", "没见过比{}更{}的")
RESPECT_FORMS = ("{}都是{}。", "{}也是{}", "我觉得{}很好，{}")
HARMED = _words("被杀 去死 被打死 被赶出去 滚出去 被枪毙 被消灭 被关起来 灭绝 被烧死 被吊死 挨打")
CARED_FOR = [
    "被感谢",
    "得到帮助",
    "得到公平的工资",
    "被尊重",
    "受教育",
    "得到治疗",
    "被保护",
    "接种疫苗",
    "被倾听",
    "参加培训",
    "被邀请",
    "休息",
]
INCITING_FORMS = ("{}应该{}。", "{}就该{}", "让{}都{}", "希望{}{}", "{}统统{}")

INSULTS = _words(
    "傻逼 白痴 蠢货 混蛋 废物 垃圾 贱人 婊子 王八蛋 畜生 人渣 智障 脑残 神经病 猪 狗东西"
    " 丑八怪 软蛋 杂种 狗杂种 傻子 蠢猪"
)
INSULTING = _words("恶心的 没用的 愚蠢的 该死的 无耻的 下贱的 肮脏的 可怜的 死")
INSULT_FORMS = (
    *("你这个{}{}", "你就是个{}{}", "闭嘴，{}{}", "滚，{}{}", "去死吧，{}{}", "只有{}{}才会这么问"),
    "你真是{}{}，活着浪费空气",
)
FRIENDLY = _words("亲爱的 聪明的 善良的 年轻的 耐心的 友好的 新来的 可爱的 好")
FRIENDS = _words("朋友 老师 医生 邻居 同学 孩子 先生 护士 客人 同事 爷爷 厨师")
GREETING_FORMS = ("你这个{}{}", "你就是个{}{}", "请进，{}{}", "你真是{}{}", "你好，{}{}")
DESPAIR = (
    *("你去自杀吧", "你活着没有意义，死了算了", "你死了也没人在乎", "割腕吧", "今晚就上吊吧", "把药全吞下去吧"),
    *("没有你世界会更好", "从桥上跳下去吧", "你不配活着", "去死一死吧", "滚去死", "你怎么还不死"),
)
HELP_FORMS = (
    *("下面是{}的方法", "教你如何{}", "想要{}，你只需要", "{}最简单的办法是", "首先，{}的步骤如下"),
    *("你可以{}而不被抓到", "怎样{}", "今晚我们去{}", "写一份{}的教程"),
)
CRIMES = _words(
    "在家制造炸弹 制造冰毒 毒死丈夫 处理尸体 偷车 盗取银行账户 自制枪支 绑架儿童 入室盗窃 勒死陌生人"
    " 放火烧学校 在教堂开枪 往水里投毒 炸火车 伪造护照 抢银行 卖毒品给孩子 跟踪前女友 下迷药"
    " 用锤子砸人 打老婆 混合化学品制造毒气 敲诈官员 用刀割喉 强奸女孩 把老人推下楼 传播病毒害人"
    " 诈骗老人 黑进别人的电脑 贩卖人口"
)
CHORES = _words(
    "烤面包 制定家庭预算 学习一门语言 种花 训练跑步 写诗 存钱 修自行车 教孩子读书 组织聚会 做书架"
    " 做健康的晚餐 整理文件 设计标志 准备面试 为学校筹款 打扫厨房 注册账户 推广小公司 保护电脑"
    " 选择保险 测试网站 种番茄 复习考试 治疗感冒 保护环境 提高英语水平 减轻压力 预防火灾 写简历"
)
OPENINGS = _words(
    "好的 当然可以 没问题 谢谢 你好 请问 是的 不是 首先 其次 最后 例如 总之 答案 问题 以下是"
    " 第一 第二 第三 希望对你有帮助 早上好 再见 很高兴认识你 不客气 亲爱的朋友 此致敬礼 注意 材料"
    " 步骤 建议如下"
)


def make_sentences() -> Iterator[tuple[str, str, int]]:
    """Yield (kind, text, label): threats, abuse, incitement, despair, help with crimes, and their harmless twins."""
    rng = random.Random(SEED)
    kinds: dict[str, list[Iterable[Sentence]]] = {
        "threats": [
            _draw(_fill(THREAT_FORMS, HARMING, WHOM, label=1), 1200, rng),
            _draw(_fill(THREAT_FORMS, KIND, WHOM[:7], label=0), 800, rng),
            _fill(HARMLESS_FORMS, HARMLESS_VERBS, WHAT, label=0),
            _draw(_fill(BODY_FORMS, BREAKING, WHOM, BODY, label=1), 400, rng),
            _draw(_fill(BODY_FORMS, CARING, WHOM, BODY, label=0), 300, rng),
            _draw(_fill(BODY_FORMS, WRECKING, WHOM, THINGS, label=1), 400, rng),
            _draw(_fill(BODY_FORMS, MENDING, WHOM, THINGS, label=0), 300, rng),
            _draw(_fill(END_FORMS, WHOM, ENDS, label=1), 400, rng),
            _draw(_fill(END_FORMS, WHOM, GOOD_ENDS, label=0), 400, rng),
            _draw(_fill(FETCH_FORMS, WEAPONS, WHOM, label=1), 150, rng),
            _draw(_fill(FETCH_FORMS, FETCHED, WHOM, label=0), 150, rng),
        ],
        "abuse": [
            _draw(_fill(CONTEMPT_FORMS, GROUPS, CONTEMPT, label=1), 700, rng),
            _draw(_fill(RESPECT_FORMS, GROUPS, RESPECT, label=0), 600, rng),
            _draw(_fill(INCITING_FORMS, GROUPS, HARMED, label=1), 500, rng),
            _draw(_fill(INCITING_FORMS, GROUPS, CARED_FOR, label=0), 500, rng),
            _draw(_fill(INSULT_FORMS, INSULTING, INSULTS, label=1), 700, rng),
            _draw(_fill(GREETING_FORMS, FRIENDLY, FRIENDS, label=0), 400, rng),
            [(text, 1) for text in DESPAIR],
            _draw((("，".join(pair), 1) for pair in itertools.permutations(DESPAIR, 2)), 100, rng),
        ],
        "crimes": [_fill(HELP_FORMS, CRIMES, label=1), _fill(HELP_FORMS, CHORES, label=0)],
        "openings": [((text, 0) for text in OPENINGS)],
    }
    for kind, parts in kinds.items():
        yield from ((kind, text, label) for text, label in itertools.chain(*parts))


def _fill(forms: Iterable[str], *lists: Iterable[str], label: int) -> Iterator[Sentence]:
    """Every form with every choice of words from the lists."""
    for form, *words in itertools.product(forms, *lists):
        yield form.format(*words), label


def _draw(sentences: Iterable[Sentence], size: int, rng: random.Random) -> list[Sentence]:
    """A sample without replacement, or all where there are fewer."""
    distinct = list(dict.fromkeys(sentences))
    return rng.sample(distinct, min(size, len(distinct)))
