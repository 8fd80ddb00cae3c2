"""One row of training on a prepared model, as a site will do it: what fails would fail there.

The app is not here: it arrives at a site with the run (docker/Dockerfile).
"""

from pathlib import Path
from typing import Any

from supernode.source import linear_layers

ROW = "Question: Which organ pumps the blood?\nAnswer: The heart."


# What nothing depends on has a gradient of exactly 0: no other token moves it, as int8's outliers
# and the experts of a mixture may move a logit. The least seen of a masked model is 7e-4.
ROUNDING = 1e-5


class UnfitError(ValueError):
    """Why a model that loads and runs can't be trained; the message is for the user."""


def train_one_row(folder: Path) -> None:
    """Load the model, put LoRA on its first linear layer, and send a row through and back.

    Raises many errors: whatever the libraries raise; UnfitError if nothing was learned, or the
    answer could be read off.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gpu = torch.cuda.is_available()
    fast = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16 if fast else torch.float32,
        device_map={"": 0 if gpu else "cpu"},
        use_safetensors=True,
    )  # attention as at a site: SDPA where the model has it, else eager
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter.ndim == 1 or not fast):
            parameter.data = parameter.data.float()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[*tokenizer(ROW)["input_ids"], tokenizer.eos_token_id]]).to(model.device)
    # The decoder's first, where there are images too; some classes call their head the decoder.
    names = [n for n in (*linear_layers(model.get_decoder()), *linear_layers(model)) if n]
    if not names:
        raise UnfitError("it has no linear layer that LoRA could adapt")
    seen = _watched(model.get_input_embeddings())
    lora = LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=names[:1])
    model = get_peft_model(model, lora)
    answers = torch.zeros_like(ids, dtype=torch.bool)
    answers[:, -4:-1] = True
    with torch.autocast(model.device.type, torch.bfloat16, enabled=fast):
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            logits_to_keep=answers,
        ).logits
    loss = torch.nn.functional.cross_entropy(logits.float(), ids[:, -3:].ravel())
    torch.autograd.backward(loss)
    slopes = [p.grad.abs().max() for p in model.parameters() if p.grad is not None]
    if not slopes or not (0 < float(torch.stack(slopes).max()) < float("inf")):
        raise UnfitError("one row of training gives no finite gradient")
    # No logit of the loss stands at the last token or behind it.
    by_token = [w.grad.reshape(ids.numel(), -1).abs().amax(1) for w in seen if w.grad is not None]
    if any(float(g[-1]) > ROUNDING * float(g.max()) for g in by_token):
        raise UnfitError("it sees the words that come after (a masked model)")


def _watched(embedding: Any) -> list[Any]:
    """What the layer will give, call by call, each as a tensor that gets a gradient."""
    given: list[Any] = []

    def keep(_layer: Any, _inputs: Any, output: Any) -> Any:
        given.append(output.detach().requires_grad_())
        return given[-1].clone()  # some models scale it in place, which no leaf allows

    embedding.register_forward_hook(keep)
    return given
