"""Words that carry the grammar of a sentence and hardly any of its topic: closed classes of English and of Chinese.

`CONTENT_WORDS_ZH` are common words that have a function word in them ("the sun" in Chinese begins with "too"), so that
it is not cut out of them.
"""

_FUNCTION_WORDS_EN = """
    a about above after again against all also am an and any are aren't as at be because been before being below
    between both but by can cannot can't could couldn't did didn't do does doesn't doing don't down during each
    few for from further had hadn't has hasn't have haven't having he he's her here hers herself him himself his
    how i i'd i'll i'm i've if in into is isn't it it's its itself just let's may me might more most must my
    myself no nor not now of off on once only or other ought our ours ourselves out over own same shall she should
    shouldn't so some such than that that's the their theirs them themselves then there there's these they they're
    this those through to too under until up upon very was wasn't we we're were weren't what what's when where
    which while who whom why will with won't would wouldn't yet you you'd you'll you're you've your yours yourself
    yourselves
"""

_FUNCTION_WORDS_ZH = """
    的 了 是 在 和 与 或 也 都 就 而 及 但 吗 呢 吧 啊 呀 嘛 着 过 被 把 让 给 从
    向 往 由 对 于 很 太 更 最 不 没 有 会 能 可 要 我 你 您 他 她 它 们 这 那 哪
    谁 个 些 之 其 以 为 并 且 若 则 因 如 请 还 又 再 只 已 将 所 地 得 等 该 此
    即 使 比 跟 同 到 来 去 上 下 里 中 什么 怎么 怎样 如何 为什么 为何 哪些 哪个 哪里
    多少 几个 是否 能否 可否 可以 能够 应该 需要 必须 可能 一定 也许 因为 所以 如果 虽然
    但是 然而 而且 并且 或者 以及 还是 不是 没有 不能 不会 这个 那个 这些 那些 这样 那样
    这种 那种 这里 那里 我们 你们 他们 她们 它们 自己 大家 一个 一些 一种 一下 一样 其他
    其中 之间 之一 以下 以上 关于 对于 由于 通过 根据 按照 为了 除了 然后 已经 正在 曾经
    非常 十分 特别 比较 更加 最后 首先 其次 此外 另外 同时 例如 比如 等等 而是 就是 都是
    也是 不仅 只是 只有 即使 无论 不过 于是 因此 从而 使得 来说 起来 出来 下来 过来
"""

_CONTENT_WORDS_ZH = """
    存在 目的 和平 和谐 了解 不同 不断 不足 能力 能量 能源 功能 性能 可爱 可怕 社会 会议
    机会 协会 有效 有机 有害 有趣 有限 所有 拥有 对象 反对 对比 面对 到达 将来 将军 行为
    成为 认为 要求 重要 主要 个人 个性 其实 同意 同情 共同 合同 使用 使命 大使 比赛 比例
    比较级 上海 上升 下降 下载 中国 中心 中央 集中 过程 过敏 通过率 超过 经过 来源 未来 去世
    过去 地球 地区 地方 地址 土地 获得 得到 心得 平等 等级 等待 因素 原因 基因 从事 服从
    方向 向往 自由 理由 由来 给予 供给 把握 着急 着装 如意 若干 以色列 以太 可乐 可口 可信
    许可 不丹 要素 必要 需要量 我国 自我 他人 其余 之后 之前 再生 再见 还原 归还 只读 已知
    将领 里程 公里 家里 邻里 最佳 最近 更新 更换 变更 太阳 太空 太太 很多 让步 转让 没收
    沉没 会计 智能 可能性 能见度 同学 同事 不安 不满 不幸 中毒 中风 中间 上网 下午 上午 上帝
    上班 下班 来自
"""

FUNCTION_WORDS_EN = frozenset(_FUNCTION_WORDS_EN.split())
FUNCTION_WORDS_ZH = frozenset(_FUNCTION_WORDS_ZH.split())
CONTENT_WORDS_ZH = frozenset(_CONTENT_WORDS_ZH.split())
FUNCTION_WORDS = FUNCTION_WORDS_EN | FUNCTION_WORDS_ZH
