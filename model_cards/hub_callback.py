"""The Trainer's card callback under its documented name; it lives in ``deepseek_model_cards.hub.trainer_callback``."""

from deepseek_model_cards.hub.trainer_callback import HubCardCallback

__all__ = ["HubCardCallback"]
