"""jaxrlhf: SFT, reward modelling and PPO in functional JAX, and what they do to generalisation and diversity."""

__version__ = "0.1.0"
