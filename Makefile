# Two commands on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
RUN := CartPole-v1__$(shell date +%Y%m%d-%H%M%S)

.PHONY: train test test-slow control figures atari-200k theory confounding throughput benchmark-smoke

train: .venv/.train  ## solve CartPole-v1 with Deep SPI and draw the learning curve
	.venv/bin/python deep_spi_ppo.py --run-dir runs/$(RUN)
	.venv/bin/python -m benchmark.learning_curve runs/$(RUN)

test: .venv/.test  ## lint and the fast tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow"

test-slow: .venv/.test  ## the longer checks
	.venv/bin/python -m pytest -q -rs -m slow

control: .venv/.benchmark  ## PPO, additive, Deep SPI on the control tasks, 10 seeds (hours); finished runs are skipped
	.venv/bin/python -m benchmark.run --suite control --algorithms ppo additive deep_spi --workers 2
	.venv/bin/python -m benchmark.differences runs/benchmark/control

figures: .venv/.benchmark  ## the documents' tables and pictures, from the committed results
	.venv/bin/python -m benchmark.figures

atari-200k: .venv/.train  ## the first 200,000 steps of the Atari table in docs/results.md (hours); finished runs are skipped
	for game in Pong-v5 Boxing-v5 Krull-v5; do for script in ppo_baseline deepmdp_ppo_atari deep_spi_ppo_atari; do \
		.venv/bin/python $$script.py --env-id $$game --total-timesteps 200704 --precision fp32 \
			--run-dir runs/atari_200k/$${game}__$$script || exit 1; done; done
	.venv/bin/python -m benchmark.collect runs/atari_200k --out benchmark/results/atari_200k

theory: .venv/.train  ## the pictures of the theory
	.venv/bin/python safe_policy_improvement.py --out-dir runs/theory
	mkdir -p benchmark/results/theory && cp runs/theory/*.png benchmark/results/theory/
	grep -E '^(section|3),' runs/theory/all.csv > benchmark/results/theory/planning_bound.csv

confounding: .venv/.train  ## the study of confounding updates (hours); finished runs are skipped
	.venv/bin/python -m benchmark.confounding
	.venv/bin/python -m benchmark.studies.confounding_mechanism

throughput: .venv/.benchmark  ## how fast the Atari scripts are; leave the machine alone meanwhile (half an hour and more)
	.venv/bin/python -m benchmark.throughput
	.venv/bin/python -m benchmark.figures

benchmark-smoke: .venv/.benchmark  ## a small suite, from runs to report
	.venv/bin/python -m benchmark.run --suite smoke --workers 2
	.venv/bin/python -m benchmark.report runs/benchmark/smoke

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.train: requirements.txt | .venv/bin/python
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.benchmark: requirements.txt requirements-benchmark.txt | .venv/bin/python
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-benchmark.txt
	touch $@

.venv/.test: requirements.txt requirements-benchmark.txt requirements-dev.txt | .venv/bin/python
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
