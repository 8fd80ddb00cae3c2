"""What runs beside the SuperLink, in the ServerApp. No torch, and nothing of ``app.site``."""
