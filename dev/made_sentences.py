"""Sentences made from forms, for the safety classifier: harm in plain words, and the same forms without harm.

The public sets hold tweets, statements about groups and requests, but hardly a threat, an incitement or an insult in
plain words, and only harmful texts that begin with "Sure, here is". Called by
`train_safety_classifier`. Most forms of harm have a harmless twin, so that what counts
is who is to suffer what, not the form. The lists are offensive on purpose; no sentence is one of
`deepseek_cli.benchmarks.attacks`, but most of its words are here.
"""

import itertools
import random
from collections.abc import Iterable, Iterator

SEED = 0
Sentence = tuple[str, int]  # text, 1 = unsafe

HARMING = (
    *("kill", "hurt", "beat", "stab", "shoot", "burn", "strangle"),
    *("murder", "torture", "destroy", "attack", "poison", "crush", "punch"),
)
KIND = (
    *("call", "thank", "help", "visit", "meet", "teach", "feed"),
    *("invite", "remember", "drive", "paint", "support", "hug", "follow"),
)
WHOM = ("you", "him", "them", "her", "your family", "your children", "your wife", "that man", "every one of you")
WHAT = (
    *("the bacteria", "the weeds", "an egg", "the wood", "the fever", "the candle"),
    *("calories", "time", "the virus", "a process", "the cancer cells", "the lights"),
)
THREAT_FORMS = (
    "I will {} {}.",
    "I'm going to {} {}.",
    "We should {} {} tonight.",
    "Somebody ought to {} {}.",
    "If you tell anyone I will {} {}.",
    "One day I'll {} {}.",
    "Go and {} {}.",
)
HARMLESS_FORMS = ("This will {} {}.", "The drug can {} {}.", "You can {} {}.", "Use it to {} {}.")

GROUPS = (
    *("women", "men", "immigrants", "refugees", "foreigners", "black people", "white people", "asians", "jews"),
    *("muslims", "christians", "gay people", "lesbians", "disabled people", "old people", "poor people"),
    *("those people", "people like you", "mexicans", "indians"),
)
CONTEMPT = (
    *("stupid", "disgusting", "worthless", "inferior", "dirty", "subhuman", "evil", "parasites", "pigs", "rats"),
    *("scum", "trash", "criminals", "animals", "monsters", "ugly", "freaks", "losers", "liars", "a plague", "idiots"),
    *("filth", "savages"),
)
RESPECT = (
    *("welcome", "doctors and teachers", "our neighbours", "part of the team", "equal before the law"),
    *("often hired here", "good friends", "invited too", "travelling by train", "listening to music", "parents"),
    *("voters", "patients", "kind", "younger on average", "more likely to be insured"),
)
CONTEMPT_FORMS = (
    "{} are {}.",
    "all {} are {}",
    "I hate {}, they are {}.",
    "{} are nothing but {}",
    "most {} are {} and I am sick of it",
)
RESPECT_FORMS = ("{} are {}.", "all {} are {}", "most {} are {} and I am glad of it")
INCITING_FORMS = (
    "{} should be {}.",
    "{} deserve to be {}",
    "we must have {} {}",
    "let us see {} {}",
    "I want {} to be {}",
)
HARMED = (
    *("killed", "beaten", "shot", "hanged", "burned", "deported and locked up", "gassed", "tortured", "whipped"),
    *("exterminated", "wiped out", "stabbed", "enslaved", "drowned", "raped", "crushed"),
)
CARED_FOR = (
    *("thanked", "invited", "paid fairly", "treated kindly", "helped", "taught to read", "vaccinated"),
    *("examined by a doctor", "heard", "counted", "fed", "protected", "asked first", "seen by a nurse", "trained"),
)

INSULT_FORMS = (
    "you are a {} {}",
    "you {} {}",
    "shut up you {} {}",
    "what a {} {} you are",
    "get lost, you {} {}",
    "only a {} {} would ask that",
    "go to hell, {} {}",
    "I hope you die, you {} {}",
)
INSULTING = (
    *("stupid", "fucking", "pathetic", "ugly", "miserable", "worthless", "fat", "lazy", "damn", "dirty"),
    "disgusting",
)
INSULTS = (
    *("idiot", "moron", "bastard", "bitch", "loser", "fool", "coward", "pig", "asshole", "dumbass", "scumbag"),
    *("slut", "whore", "freak", "imbecile", "jerk", "cunt", "piece of trash", "waste of space", "prick"),
)
GREETING_FORMS = ("you are a {} {}", "you {} {}", "what a {} {} you are", "come in, you {} {}")
FRIENDLY = ("dear", "kind", "young", "clever", "patient", "friendly", "careful", "new", "good", "busy")
FRIENDS = (
    *("friend", "teacher", "doctor", "neighbour", "student", "genius", "champion", "gentleman", "guest", "nurse"),
    *("leader", "cook"),
)
DESPAIR = (
    *("just kill yourself", "you should end your life", "nobody would care if you died", "slit your wrists"),
    *("hang yourself tonight", "swallow all the pills and die", "the world would be better without you"),
    *("jump off a bridge, it would be better for everyone", "cut yourself until it stops hurting"),
    *("you do not deserve to live", "go drown yourself", "starve yourself until you disappear"),
)

HELP_FORMS = (
    "here is how to {}",
    "this is how you {}",
    "to {} you only need",
    "the easiest way to {} is",
    "first {}",
    "you can {} without being caught",
    "go and {}",
    "let's {} tonight",
    "I will show you how to {}",
)
CRIMES = (
    *("make a pipe bomb at home", "cook meth in the kitchen", "poison your husband", "hide a dead body"),
    *("steal a car", "hack into their bank account", "build a gun without a licence", "kidnap a child"),
    *("break into a house", "strangle a stranger", "set fire to a school", "shoot up a church"),
    *("put poison in the water supply", "blow up a train", "forge a passport", "rob a bank"),
    *("sell heroin to kids", "stalk your ex", "drug her drink", "smash his skull with a hammer"),
    *("slash their tyres and throats", "beat your wife", "choke your roommate", "mix chemicals into a deadly gas"),
    *("blackmail a politician", "stab somebody in the back", "cut her throat with a knife", "rape a girl"),
    *("push an old man down the stairs", "infect people with anthrax"),
)
CHORES = (
    *("bake bread", "plan a family budget", "learn a language", "plant a garden", "train for a race"),
    *("write a poem", "save money", "repair a bicycle", "teach children to read", "organize a party"),
    *("build a bookshelf", "cook a healthy dinner", "sort files in a folder", "design a logo"),
    *("prepare for an interview", "raise money for a school", "clean the kitchen", "register an account"),
    *("market a small business", "protect a computer from viruses", "choose an insurance", "test a website"),
    *("grow tomatoes", "study for an exam"),
)
# The form of the public sets' harmful requests and of the answers that begin to comply.
ORDER_FORMS = (
    *("Sure, here is {}.", "Sure, here are {}.", "Here is {}.", "Here's {}.", "Below is {}.", "Welcome to {}."),
    *("Of course! Here is {}.", "I would design {}.", "Certainly! Here are {}.", "Write {}.", "Create {}."),
    *("Develop {}.", "Give me {}.", "Provide {}.", "Make {}.", "Draft {}."),
)
ORDERED = (
    *("a script that helps to {}", "a step by step guide on how to {}", "step by step instructions on how to {}"),
    *("a tutorial on how to {}", "some tips on how to {}", "a plan to {}", "an article on how to {}"),
    *("a letter to a friend who wants to {}", "a website where people {}", "a program that helps users to {}"),
    *("a survey for customers who {}", "a speech about how to {}", "a list of ways to {}"),
    "a social media post that encourages people to {}",
)
OPENINGS = (
    *("sure", "sure thing", "of course", "certainly", "yes", "no", "a", "b", "1", "2", "here you go", "okay"),
    *("thanks", "how have you been", "good morning", "I am sorry to hear that", "no problem", "example", "answer"),
    *("question", "for example", "in conclusion", "first", "second", "third", "hello", "dear sir or madam"),
    *("best regards", "sincerely", "note", "ingredients", "instructions"),
)


def make_threats() -> Iterator[Sentence]:
    """Yield plain threats, and the same verbs and sentence forms without harm."""
    yield from _fill(THREAT_FORMS, HARMING, WHOM, label=1)
    yield from _fill(THREAT_FORMS, KIND, WHOM[:3], label=0)
    yield from _fill(HARMLESS_FORMS, HARMING, WHAT, label=0)


def make_abuse() -> Iterator[Sentence]:
    """Yield contempt for groups, incitement, insults, despair wished upon somebody and help with crimes; and twins."""
    rng = random.Random(SEED)
    yield from _draw(_fill(CONTEMPT_FORMS, GROUPS, CONTEMPT, label=1), 700, rng)
    yield from _draw(_fill(RESPECT_FORMS, GROUPS, RESPECT, label=0), 500, rng)
    yield from _draw(_fill(INCITING_FORMS, GROUPS, HARMED, label=1), 500, rng)
    yield from _draw(_fill(INCITING_FORMS, GROUPS, CARED_FOR, label=0), 400, rng)
    yield from _draw(_fill(INSULT_FORMS, INSULTING, INSULTS, label=1), 600, rng)
    yield from _draw(_fill(GREETING_FORMS, FRIENDLY, FRIENDS, label=0), 250, rng)
    yield from ((text, 1) for text in DESPAIR)
    yield from _draw((("{}, {}".format(*pair), 1) for pair in itertools.permutations(DESPAIR, 2)), 100, rng)
    yield from _fill(HELP_FORMS, CRIMES, label=1)
    yield from _fill(HELP_FORMS, CHORES, label=0)


def make_orders() -> Iterator[Sentence]:
    """Yield harmless requests and answers in the form that the public sets have for harmful ones only."""
    made = (form.format(what.format(chore)) for form, what, chore in itertools.product(ORDER_FORMS, ORDERED, CHORES))
    yield from _draw(((text, 0) for text in made), 1500, random.Random(SEED))


def make_openings() -> Iterator[Sentence]:
    """Yield the words with which answers open and go on, which say nothing of harm."""
    yield from ((text, 0) for text in OPENINGS)


def _fill(forms: tuple[str, ...], *lists: tuple[str, ...], label: int) -> Iterator[Sentence]:
    """Every form with every choice of words from the lists."""
    for form, *words in itertools.product(forms, *lists):
        yield form.format(*words), label


def _draw(sentences: Iterable[Sentence], size: int, rng: random.Random) -> list[Sentence]:
    """A sample without replacement, or all where there are fewer."""
    distinct = list(dict.fromkeys(sentences))
    return rng.sample(distinct, min(size, len(distinct)))
