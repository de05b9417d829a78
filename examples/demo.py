"""The whole job from Python: rows, a pool, two merges, answers that were checked, figures, and the way to PEFT."""

import sys

import mlx_rsgwm as rs

out = sys.argv[1] if len(sys.argv) > 1 else "runs/example"
base = sys.argv[2] if len(sys.argv) > 2 else "smollm2-135m"
tasks, progress = ("change", "groups", "compare", "prices"), rs.LineProgress()

for task in tasks:
    corpus = rs.build_corpus(task, f"{out}/data/{task}", draft_rows=144, verify_rows=32)
    rs.train(corpus, f"{out}/pool/{task}", base=base, epochs=1, learning_rate=1e-3, progress=progress)
pool = [f"{out}/pool/{task}" for task in tasks]
rs.merge(pool, f"{out}/drafter", method="regmean", role="draft")
rs.merge(pool, f"{out}/verifier", method="regmean", role="verify")
pipeline = rs.open_pipeline(f"{out}/drafter", f"{out}/verifier", base=base, max_tokens=32, progress=progress)
rs.calibrate(pipeline, rs.load_questions(tasks, split="calibration", limit=8), progress=progress)
questions = rs.load_questions(tasks, limit=24)
print(questions[0].question, pipeline.answer(questions[0].question), sep="\n")
result = rs.evaluate(pipeline, questions, f"{out}/report", progress=progress)
print("right before and after checking:", result["drafter"]["accuracy"], result["draft_verify"]["accuracy"])
rs.convert(f"{out}/drafter", f"{out}/drafter-peft", to="peft")
