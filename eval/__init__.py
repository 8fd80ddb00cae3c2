"""Score adapters on PubMedQA, MedMCQA, MedQA and CareQA as the FlowerTune leaderboard does."""


class EvalError(Exception):
    """The evaluation cannot start or go on; the message is one line for the user."""
