"""The words around a question: the Alpaca form that FlowerTune trains and evaluates with."""

_PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)


def training_prompt(question: str) -> str:
    """Everything before the answer.

    Ends without a space: the space belongs to the answer's first token, in Llama-3's
    vocabulary as in SmolLM2's, so prompt and answer can be tokenised apart.
    """
    return f"{_PREAMBLE}\n### Instruction:\n{question}\n### Response:"
