"""The fake vLLM as an installed package: put tests/fakes/fake_site on PYTHONPATH of the serving environment."""

__version__ = "0.0.0"
