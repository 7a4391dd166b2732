"""`python -m vllm.entrypoints.openai.api_server` of the fake."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parents[4] / "fake_vllm.py"), run_name="__main__")
