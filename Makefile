# Each command does all its set-up on a fresh machine (Python 3.10+ with pip);  make install  does nothing else.
# With CONSTRAINTS=constraints.txt they install the exact versions that the suite was last seen to pass with.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OUTPUT := demo_output
KILLS := 50

.PHONY: install demo page test test-faults lint clean

install: $(VENV)/installed
	@echo "set up; after  . $(VENV)/bin/activate  every command of the README is as printed"

demo: $(VENV)/installed
	$(RUN) train_align_with_args.py --load_config config/demo.json
	$(RUN) eval_align.py --checkpoint $(OUTPUT)/ckpt_align --eval_data_dir assets/photos/eval \
		--output_dir $(OUTPUT)/eval_results --save_visualizations
	@echo "pictures:    $(OUTPUT)/eval_results/*.png"
	@echo "checkpoints: $(OUTPUT)/ckpt_align"
	@echo "TensorBoard: $(VENV)/bin/tensorboard --logdir $(OUTPUT)/runs"
	@echo "report:      $(OUTPUT)/eval_results/report.html"

page: $(VENV)/installed $(OUTPUT)/ckpt_align demo/node_modules
	$(RUN) demo/build.py --checkpoint $(OUTPUT)/ckpt_align --output $(OUTPUT)/page.html

$(OUTPUT)/ckpt_align: | $(VENV)/installed
	$(RUN) train_align_with_args.py --load_config config/demo.json

demo/node_modules: demo/package-lock.json
	npm ci --prefix demo --ignore-scripts --no-audit --no-fund
	@touch $@

test: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest --numprocesses 2 --dist loadscope

test-faults: $(VENV)/installed
	VAE_ALIGN_FAULTS=$(KILLS) $(RUN) -m pytest -s tests/training/test_faults.py

lint: $(VENV)/installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements.txt $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	@touch $@

clean:
	rm -rf $(VENV) $(OUTPUT)
