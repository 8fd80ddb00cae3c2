"""One row of training on a prepared model, as a site will do it: what fails would fail there.

The app is not here: it arrives at a site with the run (docker/Dockerfile).
"""

from pathlib import Path

from supernode.source import linear_layers

ROW = "Question: Which organ pumps the blood?\nAnswer: The heart."


def train_one_row(folder: Path) -> None:
    """Load the model, put LoRA on its first linear layer, and send a row through and back.

    Raises many errors: whatever the libraries raise; ValueError if nothing was learned.
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
        raise ValueError("it has no linear layer that LoRA could adapt")
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
        raise ValueError("one row of training gives no finite gradient")
