"""Questions to a served model, and scores of its answers.

Stage programs: `evaluate` (the holdout), `prompts` (must-pass), `lm_eval_tasks`, `llm_judge` and `loadtest`. All are HTTP clients.
"""
