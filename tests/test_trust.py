"""Nothing that comes over the network is unpickled: code that another machine sends would be run."""

import ast

import pytest
from launching import ROOT

FORBIDDEN = {
    *("gather_object", "all_gather_object", "broadcast_object_list", "scatter_object_list"),
    *("send_object_list", "recv_object_list", "gather_for_metrics"),
    *("loads_pickle", "ForkingPickler", "Unpickler", "marshal", "shelve", "dill", "cloudpickle", "eval", "exec"),
}
"""Names of what unpickles, or runs text, wherever they are used."""

MODULES = sorted((ROOT / "layup_hf").rglob("*.py"))


def uses(source):
    """What the module does that it should not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name | ast.Attribute | ast.alias):
            name = (
                node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else node.name
            )
            if name in FORBIDDEN or (isinstance(node, ast.alias) and name == "pickle"):
                found.append(name)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle":
            found.append(f"pickle.{node.attr}")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            if options.get("weights_only") != "True":
                found.append("torch.load")
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(ROOT)))
def test_no_module_unpickles(module):
    assert uses(module.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from accelerate.utils import gather_object",
        "import torch\ntorch.distributed.broadcast_object_list([1])",
        "import pickle",
        "import pickle as p",
        "from multiprocessing.reduction import ForkingPickler",
        "import torch\ntorch.load('file')",
        "import torch\ntorch.load('file', weights_only=False)",
        "eval('1')",
    ],
)
def test_what_would_is_found(source):
    assert uses(source)


def test_what_does_not_is_left_alone():
    assert uses("from pickle import UnpicklingError\nimport torch\ntorch.load('f', weights_only=True)") == []
