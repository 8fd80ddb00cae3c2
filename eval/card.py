"""The model card of an exported adapter: what it is, how it came about, what nobody has checked.

Of sites and rows it says how many, and no more: it is made to be passed on.
"""

import json
import re
from typing import Any

from app.site.prompts import training_prompt
from eval.summary import caveat, decimals, p_text

# Of the run config: they name sites, and runs that the reader does not have.
_PRIVATE = ("strategy.exclude-sites", "resume")


def card(about: dict[str, Any]) -> str:
    """README.md, in Markdown with the hub's metadata in front.

    Args:
        about: ``name`` of the base model and its ``fingerprint``; ``round``, ``sha256`` and
            ``settings`` (adapter_config.json) of the adapter; ``run``, the id of its run, its
            ``facts`` and ``lines`` (run.json, metrics.jsonl until that round) and ``state`` in
            words; ``asked``: best, last or a number; ``report`` of an evaluation that scored it,
            or empty; ``merged``: into what, in words, or empty.
    """
    name, merged = _plain(about["name"]), about["merged"]
    what = "a merged model" if merged else "a LoRA adapter"
    sections = {
        "What it is": _facts(about),
        "Use it": _use(name, bool(merged), about["facts"]["config"].get("model.prompt", "alpaca")),
        "How it was trained": _training(about),
        "Evaluation": _evaluation(about),
        "What was not done": _not_done(about),
        "Licences": _licences(name, about["facts"]["config"]),
    }
    head = ["---", f"library_name: {'transformers' if merged else 'peft'}"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):  # else a folder somewhere, of use to nobody
        head.append(f"base_model: {name}")
    head += ["tags:", "- federated-learning", "- lora", "- medical", "---"]
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return "\n".join(head) + f"\n# {name}, fine-tuned by several sites: {what}\n\n{body}\n"


def _plain(text: object) -> str:
    """On one line, and nothing that Markdown would take for its own."""
    return re.sub(r"[`|<>\s]+", " ", str(text)).strip()


def _table(*rows: tuple[object, ...]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _facts(about: dict[str, Any]) -> str:
    facts, settings = about["facts"], about["settings"]
    sites = facts.get("sites", {}).values()
    rows = [sum(site.get(key, 0) for site in sites) for key in ("num_examples", "num_holdout")]
    targets = settings["target_modules"]
    named = targets if isinstance(targets, str) else ", ".join(targets)
    table = [
        ("", ""),
        (
            "base model",
            f"`{_plain(about['name'])}`, fingerprint `{_plain(about['fingerprint'])}` of its files "
            "and how they were quantised",
        ),
        ("adapter", f"LoRA, r {settings['r']}, alpha {settings['lora_alpha']}, on {_plain(named)}"),
        ("its SHA-256", f"`{about['sha256']}`"),
        ("run", f"{_plain(about['run'])}: {_plain(about['state'])}"),
        ("round", f"{about['round']}{_why(about)}"),
        (
            "sites",
            f"{len(sites)}, with {rows[0]} rows to train on and {rows[1]} held out"
            if sites
            else "not recorded: the run ended before it had asked them",
        ),
    ]
    if about["merged"]:
        table.insert(4, ("merged into", about["merged"]))
    return _table(*table)


def _why(about: dict[str, Any]) -> str:
    return {
        "best": ", the lowest held-out loss of those that were measured at the same sites",
        "last": ", the last that was complete",
    }.get(about["asked"], ", asked for by its number")


def _use(name: str, merged: bool, prompt: str) -> str:
    load = "AutoModelForCausalLM.from_pretrained"
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if merged:
        lines.append(f'model = {load}("THIS FOLDER")')
    else:
        lines.insert(0, "from peft import PeftModel")
        lines += [
            f'base = {load}("{name}")',
            'model = PeftModel.from_pretrained(base, "THIS FOLDER")',
        ]
    of = "THIS FOLDER" if merged else name
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{of}")')
    text, answer = json.dumps(training_prompt("QUESTION")), "the answer behind it after a space"
    if prompt == "chat":
        text = (
            'tokenizer.apply_chat_template([{"role": "user", "content": "QUESTION"}], '
            "add_generation_prompt=True)"
        )
        answer = "the base model's own chat template"
    return (
        "```python\n" + "\n".join(lines) + "\n```\n\nIt was trained on questions in this form, "
        f"{answer}:\n\n```python\n{text}\n```"
    )


def _training(about: dict[str, Any]) -> str:
    config, facts = about["facts"]["config"], about["facts"]
    keys = [f"{k} = {json.dumps(v)}" for k, v in config.items() if k not in _PRIVATE]
    rows: list[tuple[object, ...]] = [
        ("round", "sites", "train loss", "held-out loss", "its sites", "token accuracy", "MiB sent")
    ]
    for line in about["lines"]:
        measured = [line.get(f"eval_{key}_median") for key in ("loss", "token_accuracy")]
        loss, accuracy = ("" if m is None else f"{m:.4f}" for m in measured)
        at = len(line.get("eval_partitions", [])) or ""
        sent = f"{line['mb_sent']:.2f}" if "mb_sent" in line else ""
        sites = len(line["partitions"])
        rows.append((line["round"], sites, f"{line['train_loss']:.4f}", loss, at, accuracy, sent))
    versions = ", ".join(f"{k} {v}" for k, v in facts.get("versions", {}).items())
    text = (
        "By fedllm-medical: each site trains on its own rows, which stay there, and sends its "
        f"adapter; a server makes one of them. Server: {_plain(versions)}. The run's config:\n\n"
        "```toml\n" + "\n".join(keys) + "\n```\n\n"
    )
    if before := len(facts.get("resumed_from", [])):
        text += f"The run went on after {before} that had been cut off; sites are the last one's.\n"
    return text + (
        "Losses are per answer token; the held-out ones, and the accuracy, are medians of the "
        "sites' own, on rows that no site trains on. MiB (2^20 bytes) are of adapters, both "
        "ways, so far.\n\n" + _table(*rows)
    )


def _evaluation(about: dict[str, Any]) -> str:
    report = about["report"]
    if not report:
        return "None: `python -m eval` has not scored this round into the run's folder."
    subjects = report["subjects"]
    (own,) = [s for s in subjects if s["sha256"] == about["sha256"]][:1]
    base = [s for s in subjects if s["adapter"] is None]
    rows: list[tuple[object, ...]] = [
        ("set", "questions", "base model, %", "with the adapter, %", "95 % interval", "difference")
    ]
    for dataset, score in own["scores"].items():
        test = own.get("against_base", {}).get(dataset)
        alone = decimals(100 * base[0]["scores"][dataset]["accuracy"]) if base else ""
        low, high = (decimals(100 * x) for x in score["ci95"])
        said = f"{100 * test['difference']:+.2f}, {p_text(test)}" if test else ""
        title = _plain(report["datasets"][dataset]["title"])
        accuracy = decimals(100 * score["accuracy"])
        rows.append((title, score["n"], alone, accuracy, f"{low} to {high}", said))
    model = report["model"]
    notes = [f"The adapter on its base model in {_plain(model['kind'])}, {report['created'][:10]}."]
    if about["merged"]:
        notes.append("The merged weights themselves were not evaluated.")
    return " ".join(filter(None, [*notes, _plain(caveat(report))])) + f"\n\n{_table(*rows)}"


def _not_done(about: dict[str, Any]) -> str:
    config = about["facts"]["config"]
    clip, noise = (config.get(f"privacy.{key}", 0) for key in ("clip-norm", "noise-multiplier"))
    points = [
        "No clinical validation: it is no medical device, and no advice to anybody.",
        "No test for what it has memorised: an adapter can repeat texts that it was trained on.",
        "No secure aggregation: the server saw each site's adapter.",
        f"Noise of {noise:g} times a clipping norm of {clip:g} was added at each site; what (ε, δ) "
        "follow is not worked out here (`python -m app.plan`)."
        if noise
        else "No noise was added: no differential privacy.",
        "No test for harmful answers, bias, or any language but that of the rows.",
    ]
    if not any("eval_loss_median" in line for line in about["lines"]):
        points.append("No held-out loss was measured: strategy.fraction-evaluate was 0.")
    if about["asked"] == "best":
        points.append("The round was chosen by its held-out loss, which flatters that loss a bit.")
    if not about["report"]:
        points.append("No benchmark: see above.")
    return "\n".join(f"- {point}" for point in points)


def _licences(name: str, config: dict[str, Any]) -> str:
    data = _plain(config.get("static.dataset.name", "unknown"))
    return (
        f"- The base model `{name}`: what is made from a model is bound by its licence and its "
        "terms of use. Read them where it comes from before you pass this on; some ask for a "
        'notice and a name (Llama 3\'s: "Built with Meta Llama 3", and a name that begins with '
        '"Llama 3").\n'
        f"- The data, `{data}` by the run's config: their licence, and what each site may do with "
        "its own rows, decide whether and to whom an adapter of them may be given.\n"
        "- fedllm-medical, which trained it, is under Apache-2.0; that says nothing of the weights."
    )
