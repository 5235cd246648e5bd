"""The plan of the house: which file may import which."""

import ast
import re
import sys

from conftest import ROOT

LAYERS = (  # from the top; a module imports its own wing or what stands below it
    ("train_align_with_args",),
    ("eval_align",),
    ("training",),
    ("evaluation",),
    ("cache", "losses"),
    ("vaes", "dataloader"),
    ("images",),
    ("runtime",),
    ("utils",),
    ("vae_align",),
)
WINGS = ("training", "evaluation", "cache", "vaes", "images", "runtime")
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def product_files():
    return sorted([*ROOT.glob("*.py"), *(file for wing in WINGS for file in (ROOT / wing).glob("*.py"))])


def module_name(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file, nested=True):
    """The modules that a file imports, by full name; without `nested`, those at its top level only."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module in WINGS)


GRAPH = {module_name(file): {name for name in imports_of(file) if name.split(".")[0] in LEVEL} for file in product_files()}


def test_the_root_holds_the_six_names_that_users_type():
    """A new file at the root, where nobody finds the six that matter."""
    assert {file.stem for file in ROOT.glob("*.py")} == {name for names in LAYERS for name in names} - set(WINGS)


def test_no_import_points_upwards():
    """A wing that knows those who use it: then neither can be read or changed alone."""
    upward = [
        (module, name)
        for module, names in GRAPH.items()
        for name in names
        if LEVEL[name.split(".")[0]] < LEVEL[module.split(".")[0]]
    ]
    assert not upward


def test_no_imports_go_in_a_circle():
    """Two files that need each other: one file in truth, which loads or fails by the order of imports."""
    waiting = {module: {name for name in names if name in GRAPH} for module, names in GRAPH.items()}
    while waiting:
        free = [module for module, names in waiting.items() if not names & waiting.keys() - {module}]
        assert free, sorted(waiting)
        for module in free:
            del waiting[module]


def test_training_needs_no_page():
    """A training run that fails for the sake of a report that it never writes; also by way of a module between them."""
    needed = {module for module in GRAPH if module.startswith("training")}
    while more := {name for module in needed for name in GRAPH.get(module, ())} - needed:
        needed |= more
    assert not needed & {"evaluation.report", "evaluation.charts"}


def test_the_inference_file_stands_on_torch_alone():
    """A file that cannot be copied into a host without our other files, or without numpy or diffusers."""
    file = ROOT / "vae_align.py"
    top = {name.split(".")[0] for name in imports_of(file, nested=False)}
    assert top <= sys.stdlib_module_names | {"torch"}
    assert {name.split(".")[0] for name in imports_of(file)} - sys.stdlib_module_names <= {
        "torch",
        "safetensors",
        "huggingface_hub",
    }


def test_test_modules_do_not_import_each_other():
    """Helpers in a test module: it runs again where it is imported, and moves with its importers."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert not [
        file.name for file in files if any(name.rpartition(".")[2].startswith("test_") for name in imports_of(file) if name)
    ]


def test_the_library_names_no_flag():
    """An error of `translate` that speaks of a command line to whoever imports us; only programs and training know flags."""
    files = [ROOT / f"{name}.py" for name in ("dataloader", "losses", "utils", "vae_align")]
    files += [file for wing in ("vaes", "cache", "evaluation", "images") for file in (ROOT / wing).glob("*.py")]
    named = []
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise):
                words = [
                    each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)
                ]
                named += [(file.name, node.lineno) for word in words if re.search(r"--[a-z]", word)]
    assert not named
