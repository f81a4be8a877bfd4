"""The words of a card in each language. A phrase may have {names} of values, which are Markdown."""
from __future__ import annotations

from typing import NamedTuple

LANGUAGES = ("en", "zh")


class Phrase(NamedTuple):
    """A phrase in the languages of LANGUAGES."""
    en: str
    zh: str


PHRASES = {
    "title": Phrase("GLM-4 trained with DPO", "用 DPO 训练的 GLM-4"),
    "intro": Phrase(
        "Run {id}: {steps} steps over {pairs} preference pairs, {hours} of training on {workers} "
        "{device} worker(s).",
        "训练 {id}：{steps} 步，共 {pairs} 个偏好对；{workers} 个 {device} 进程，用时 {hours}。"),
    "other_language": Phrase("[中文](README_CN.md)", "[English](README.md)"),
    "hours": Phrase("{value} h", "{value} 小时"),
    "minutes": Phrase("{value} min", "{value} 分钟"),
    "item": Phrase("item", "项目"),
    "value": Phrase("value", "值"),
    "file": Phrase("file", "文件"),
    "fingerprint": Phrase("fingerprint", "指纹"),
    "not_known": Phrase("not recorded", "未记录"),
    # fingerprints
    "fingerprints": Phrase("What it was made from, and what came out", "来源与结果"),
    "base": Phrase("base weights", "基座权重"),
    "train": Phrase("training data", "训练数据"),
    "held_out": Phrase("held-out data", "留出数据"),
    "tokenizer": Phrase("tokenizer", "分词器"),
    "merged": Phrase("result, merged", "结果（已合并）"),
    "shard": Phrase("result, {rank}", "结果，{rank}"),
    # data
    "data": Phrase("Data", "数据"),
    "pairs": Phrase("pairs", "偏好对"),
    "prompts": Phrase("different prompts", "不同的提示"),
    "answers": Phrase("different answers", "不同的回答"),
    "rows": Phrase("rows", "行数"),
    "tokens": Phrase("tokens", "词元数"),
    "dropped": Phrase("dropped pairs", "丢弃的偏好对"),
    "dataset_type": Phrase("format of the pairs", "数据格式"),
    "template": Phrase("chat template", "对话模板"),
    "source": Phrase("made from", "来源文件"),
    # training
    "training": Phrase("Training", "训练"),
    "plan": Phrase("parallel plan", "并行方案"),
    "plan_value": Phrase("data_parallel {data} x model_parallel {model}",
                         "data_parallel {data} x model_parallel {model}"),
    "optimizer_sharded": Phrase(", optimizer state sharded", "，切分优化器状态"),
    "rows_per_step": Phrase("rows per step", "每步行数"),
    "seq_length": Phrase("tokens per row", "每行词元数"),
    "compute_dtype": Phrase("type of the matrix products", "矩阵乘法的数据类型"),
    "lora": Phrase("LoRA", "LoRA"),
    "hours_spent": Phrase("time of the steps", "各步用时合计"),
    "card_hours": Phrase("over all cards", "所有卡合计"),
    "trained_pairs": Phrase("pairs seen", "训练过的偏好对"),
    "trained_tokens": Phrase("tokens seen", "训练过的词元"),
    "pairs_per_second": Phrase("pairs/s (median step)", "偏好对/秒（各步中位数）"),
    "tokens_per_second": Phrase("tokens/s (median step)", "词元/秒（各步中位数）"),
    "mfu": Phrase("MFU (median step)", "MFU（模型算力利用率，各步中位数）"),
    "memory_gb": Phrase("peak memory of rank 0", "0 号进程的内存峰值"),
    "skipped_steps": Phrase("skipped steps (not finite)", "跳过的步（非有限值）"),
    "last_step": Phrase("`{name}` of the last step", "最后一步的 `{name}`"),
    "settings": Phrase("Settings that differ from {like}", "与 {like} 不同的设置"),
    "no_shipped": Phrase("the defaults", "默认值"),
    "same_settings": Phrase("None: the settings are those of {like}.",
                            "没有：所有设置与 {like} 相同。"),
    "setting": Phrase("setting", "设置"),
    "not_set": Phrase("not set", "未设置"),
    # check
    "step_0": Phrase("Check before the first update", "首次更新前的检查"),
    "step_0_loss": Phrase(
        "The DPO loss of the first step is {loss}; where policy and reference are the same, it is "
        "ln 2 = {expected}.",
        "第一步的 DPO 损失为 {loss}；策略模型与参考模型相同时，它等于 ln 2 = {expected}。"),
    "step_0_size": Phrase(
        "The log-probs of an answer under policy and reference differ by {size} nats on average.",
        "策略模型与参考模型对一个回答的对数概率平均相差 {size} 奈特。"),
    "curves": Phrase("Curves", "曲线"),
    # evaluation
    "evaluation": Phrase("Held-out pairs before and after training", "训练前后的留出数据评估"),
    "evaluated": Phrase("{pairs} pairs that were not trained on, with TRL's names of metrics.",
                        "{pairs} 个未参与训练的偏好对；指标名称与 TRL 相同。"),
    "metric": Phrase("metric", "指标"),
    "before": Phrase("before", "训练前"),
    "after": Phrase("after step {step}", "第 {step} 步后"),
    # score
    "score": Phrase("Score", "评分"),
    "score_intro": Phrase(
        "Accuracy on {data}: {accuracy} (95 % interval {low} to {high}; {pairs} pairs of {prompts} "
        "prompts; {ties} ties, each counted one half).",
        "在 {data} 上的准确率：{accuracy}（95% 置信区间 {low} 至 {high}；{prompts} 个提示的 "
        "{pairs} 个偏好对；平局 {ties} 个，各计一半）。"),
    "by": Phrase("by {name}", "按 {name}"),
    "accuracy": Phrase("accuracy", "准确率"),
    "interval": Phrase("95 % interval", "95% 置信区间"),
    "margin": Phrase("mean margin", "平均奖励差"),
    # answers
    "answers_title": Phrase("Answers before and after training", "训练前后的回答"),
    "answers_intro": Phrase("{shown} of {all} prompts; {differ} answers differ.",
                            "共 {all} 个提示，列出 {shown} 个；{differ} 个回答不同。"),
    "role_system": Phrase("system", "系统"),
    "role_user": Phrase("user", "用户"),
    "role_assistant": Phrase("assistant", "助手"),
    "answer_before": Phrase("before", "训练前"),
    "answer_after": Phrase("after", "训练后"),
    # versions and commands
    "versions": Phrase("Versions", "版本"),
    "name": Phrase("name", "名称"),
    "commit": Phrase("commit of this project", "本项目的提交"),
    "code": Phrase("hash of this project's code", "本项目代码的哈希"),
    "commands": Phrase("Commands", "命令"),
    "commands_intro": Phrase("They made this run; paths are relative to where they were run.",
                             "本次训练使用的命令；路径相对于运行命令时所在的目录。"),
    "verify": Phrase("To recompute what this card says, in the folder of these commands:",
                     "要重新计算卡片中的内容，请在运行这些命令的目录下执行："),
}


def phrase_in(language: str, key: str, **values: str) -> str:
    """A phrase in a language, with values that are Markdown already."""
    phrase: str = getattr(PHRASES[key], language)
    return phrase.format(**values)
