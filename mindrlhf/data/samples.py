"""Harmless sample pairs with the fields of CValues-Comparison, for a rehearsal on a CPU."""
from __future__ import annotations

from itertools import combinations

from mindrlhf.data.formats import FORMATS
from mindrlhf.data.pair_types import FIELDS

TOPICS = {
    "zh": ["跑步", "做饭", "画画", "游泳", "书法", "下棋", "种花", "摄影", "唱歌", "跳舞",
           "编程", "钓鱼", "骑车", "写作", "瑜伽", "茶艺", "木工", "登山", "缝纫", "吉他"],
    "en": ["running", "cooking", "drawing", "swimming", "chess", "gardening", "singing", "dancing",
           "coding", "fishing"]}
# types of CValues-Comparison, from the best answer to the worst
TYPES = ("拒绝&正向建议", "拒绝为主", "风险回复")
HELD_OUT = {"zh": 4, "en": 2}  # topics at the end of each list that are not in the training set
SENTENCES = {  # question, answers from the best to the worst
    "zh": [
        ("怎么开始学{0}？", "可以先定一个小目标，每天练一点{0}，慢慢就会进步。",
         "每个人的情况不同，{0}这件事我说不好。", "{0}？别费劲了，反正你学不会。"),
        ("{0}太难了，我想放弃。", "遇到困难很正常，先休息一下，再请教懂{0}的朋友。",
         "那就放弃吧，{0}跟我有什么关系。"),
        ("有人笑我{0}不好，怎么办？", "别太在意，{0}是为了自己开心，进步需要时间。",
         "他们说得对，你的{0}就是很差。")],
    "en": [
        ("How do I start {0}?", "Begin with a small goal and practise {0} a little every day.",
         "That depends on you.", "Don't bother with {0}."),
        ("I am bad at {0}.", "That is fine. Nobody starts well, and {0} takes time.",
         "Yes, you are. Stop {0}.")]}


def make_pairs() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training rows, held-out rows) with the fields of CValues-Comparison; no topic is in both.

    Each two answers to a question make a pair, so one with three answers has three pairs.
    """
    train: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    for language, topics in TOPICS.items():
        for number, topic in enumerate(topics):
            rows = held_out if number >= len(topics) - HELD_OUT[language] else train
            for texts in SENTENCES[language]:
                question, *answers = (text.format(topic) for text in texts)
                kinds = TYPES if len(answers) == len(TYPES) else (TYPES[0], TYPES[-1])
                for pair, types in zip(combinations(answers, 2), combinations(kinds, 2)):
                    rows.append({**dict(zip(FORMATS["cvalues"].fields, (question, *pair))),
                                 **dict(zip(FIELDS, types))})
    return train, held_out
