"""The package is built in floors: imports run only down, and nobody reads what another keeps for itself."""

import ast
from pathlib import Path

import pytest

from layup_hf import LayupMixin
from layup_hf.trainer.seams import OF_GENERATING, SEAMS

ROOT = Path(__file__).parents[1]
PACKAGE = "layup_hf"
TOP = "the package itself"

FLOORS = [
    {TOP, "config", "__main__"},
    {"trainer", "doctor"},
    {"gossip"},
    {"windows", "optim"},
    {"ledger", "blocks", "fleet", "progress", "device", "machine_code", "disk"},
    {"trace"},
]
"""From the top: a module imports from its own room and from the floors below. What is on top is one room."""

ROOMS_OF_TRANSFORMERS = {"trainer", "config"}
"""Who may import `transformers`."""

LIBRARY_MEMBERS = {seam.member for seam in SEAMS if seam.member.startswith("_")} | {*OF_GENERATING, "_api"}
"""What belongs to a library, is needed, and has no public name; `nixl._api` comes with an extra."""

DOCUMENTED = {"_asdict", "_exit", "_fields", "_make", "_replace"}
"""Public names of the standard library that begin with an underscore all the same."""


# ---- The rules ----


def parse(files):
    """Module name: (whether it is a package, its tree), of texts by path."""
    modules = {}
    for path, text in files.items():
        parts = Path(path).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        modules[".".join(parts[:-1] if is_package else parts)] = is_package, ast.parse(text)
    return modules


def imports(name, modules):
    """(line, module) of all that a module imports, also within functions; of ours the module itself, however named."""
    is_package, tree = modules[name]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            levels = node.level - is_package
            base = name.split(".")[: -levels or None] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                is_module = f"{base}.{alias.name}" in modules
                yield node.lineno, f"{base}.{alias.name}" if is_module else base


def room_of(module):
    """First part of the path below the package."""
    return module.split(".")[1] if "." in module else TOP


def floor_of(module):
    return next((number for number, rooms in enumerate(FLOORS) if room_of(module) in rooms), None)


def wrong_ways(modules):
    """Imports of ours that run up, or into another room of the same floor."""
    for name in modules:
        for line, target in imports(name, modules):
            if target.split(".")[0] != PACKAGE:
                continue
            here, there = floor_of(name), floor_of(target)
            is_same_room = room_of(name) == room_of(target) or here == there == 0
            if here is None or there is None or not (there > here or is_same_room):
                yield f"{name}:{line} imports {target}"


def strangers(modules):
    """Imports of `transformers` where it is not to be known."""
    for name in modules:
        for line, target in imports(name, modules):
            if target.split(".")[0] == "transformers" and room_of(name) not in ROOMS_OF_TRANSFORMERS:
                yield f"{name}:{line} imports {target}"


def circle(modules):
    """Modules that import each other in a circle, in its order, if there is one."""
    path, done = [], set()

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done or name not in modules:
            return None
        path.append(name)
        found = next(filter(None, (visit(target) for _, target in imports(name, modules) if target != name)), None)
        path.pop()
        done.add(name)
        return found

    return next(filter(None, map(visit, modules)), None)


COPY = ("copy.copy", "self")
VERBS = {"getattr": ast.Load, "hasattr": ast.Load, "setattr": ast.Store, "delattr": ast.Del}


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and name != "_"


def is_named(node, *names):
    return isinstance(node, ast.Name) and node.id in names


def members(tree):
    """(class, method, what it is a member of, name, context, line) of every private member that is touched.

    Outside of classes and methods, these two are None.
    """

    def visit(node, kind, method):
        match node:
            case ast.Attribute(value=owner, attr=name, ctx=context):
                yield kind, method, owner, name, context, node.lineno
            case ast.Call(func=ast.Name(id=verb), args=[owner, ast.Constant(value=str(name)), *_]) if verb in VERBS:
                yield kind, method, owner, name, VERBS[verb](), node.lineno
            case ast.Subscript(
                value=ast.Call(func=ast.Name(id="vars"), args=[owner]) | ast.Attribute(value=owner, attr="__dict__"),
                slice=ast.Constant(value=str(name)),
                ctx=context,
            ):
                yield kind, method, owner, name, context, node.lineno
            case ast.AugAssign(target=ast.Attribute(value=owner, attr=name)):  # it is read, too
                yield kind, method, owner, name, ast.Load(), node.lineno
                yield from visit(owner, kind, method)
                yield from visit(node.value, kind, method)
                return
            case ast.ClassDef():
                kind, method = node, None
            case ast.FunctionDef() | ast.AsyncFunctionDef() if method is None:
                method = node
        for child in ast.iter_child_nodes(node):
            yield from visit(child, kind, method)

    return [found for found in visit(tree, None, None) if is_private(found[3])]


def is_self(owner, method):
    """Whether a method's object, or its class, or a copy or another object of that is meant."""
    names = {"self", "cls"}
    for node in ast.walk(method) if method is not None else ():
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=made_by, args=arguments)):
                if ast.unparse(made_by) == "cls" or (ast.unparse(made_by), *map(ast.unparse, arguments)) == COPY:
                    names.add(name)
    return method is not None and is_named(owner, *names)


def defined(kind, touched):
    """Private names that the class itself gives its objects."""
    names = {
        name
        for inside, method, owner, name, context, _ in touched
        if inside is kind and isinstance(context, ast.Store) and is_self(owner, method)
    }
    for node in kind.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(targets=targets):
                names.update(part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return names


def base_names(kind):
    bases = [base.value if isinstance(base, ast.Subscript) else base for base in kind.bases]
    return [base.attr if isinstance(base, ast.Attribute) else base.id for base in bases]


def intrusions(modules):
    """(room, member, where) of what a class or a module reads that another keeps for itself.

    A parent's is another's, too, if the parent is one of ours: also where the child sets it.
    """
    touched = {name: members(tree) for name, (_, tree) in modules.items()}
    kinds = {}  # by name, with what they define
    for name, (_, tree) in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                kinds.setdefault(node.name, []).append((node, defined(node, touched[name])))
    own = {kind: names for same in kinds.values() for kind, names in same}

    def inherited(kind):
        parents = [parent for base in base_names(kind) for parent, _ in kinds.get(base, ()) if parent is not kind]
        return set().union(*(own[parent] | inherited(parent) for parent in parents))

    for module, (_, tree) in modules.items():
        for kind, method, owner, name, _, line in touched[module]:
            is_own = kind is not None and is_self(owner, method) and name in own[kind] - inherited(kind)
            if not is_own:
                yield room_of(module), name, f"{module}:{line} reads {ast.unparse(owner)}.{name}"
        for node in ast.walk(tree):
            for name in private_imports(node):
                yield room_of(module), name, f"{module}:{node.lineno} imports {name}"


def private_imports(node):
    match node:
        case ast.ImportFrom(module=module, names=names):
            parts = [*(module or "").split("."), *(alias.name for alias in names)]
        case ast.Import(names=names):
            parts = [part for alias in names for part in alias.name.split(".")]
        case _:
            parts = []
    return [part for part in parts if is_private(part)]


# ---- The package ----


@pytest.fixture(scope="module")
def package():
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    return parse({str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths})


def test_every_room_is_on_a_floor(package):
    assert {room_of(name) for name in package} == set().union(*FLOORS)


def test_imports_run_down(package):
    assert list(wrong_ways(package)) == []


def test_no_modules_import_each_other_in_a_circle(package):
    assert circle(package) is None


def test_only_the_trainer_and_its_options_know_transformers(package):
    assert list(strangers(package)) == []


def test_nobody_reads_what_another_keeps_for_itself(package):
    found = [where for _, name, where in intrusions(package) if name not in LIBRARY_MEMBERS | DOCUMENTED]
    assert found == []


# ---- The rules themselves ----


def ways(**files):
    return list(wrong_ways(parse({f"layup_hf/{place.replace('__', '/')}.py": text for place, text in files.items()})))


def test_what_is_below_may_be_imported():
    assert not ways(gossip__engine="from ..windows.base import W\nfrom ..blocks import B\nimport torch\n")
    assert not ways(windows__wire="from . import pace\nfrom .peers import Peer\nimport layup_hf.fleet.network as n\n")
    assert not ways(config="from .trainer.checks import check\n")


@pytest.mark.parametrize(
    ("place", "text", "target"),
    [
        ("blocks__split", "from ..gossip.engine import E", "layup_hf.gossip.engine"),
        ("blocks__split", "def f():\n    import layup_hf.gossip.engine", "layup_hf.gossip.engine"),
        ("windows__wire", "from ..optim import adam", "layup_hf.optim"),
        ("ledger__ledger", "from ..fleet.network import sign", "layup_hf.fleet.network"),
        ("trainer__loop", "from ..config import C", "layup_hf.config"),
        ("trainer__loop", "from .. import __version__", "layup_hf"),
        ("trainer__loop", "from ..attic.chest import C", "layup_hf.attic.chest"),
    ],
)
def test_what_is_not_below_may_not(place, text, target):
    (found,) = ways(**{place: text})
    assert found.endswith(f" imports {target}")


def test_a_circle_is_found():
    modules = parse(
        {
            "layup_hf/fleet/__init__.py": "",
            "layup_hf/fleet/group.py": "from .network import a",
            "layup_hf/fleet/network.py": "def f():\n    from . import store",
            "layup_hf/fleet/store.py": "from ..fleet.group import b\nimport os",
        }
    )
    places = [f"layup_hf.fleet.{name}" for name in ("group", "network", "store", "group")]
    assert circle(modules) == places
    del modules["layup_hf.fleet.store"]
    assert circle(modules) is None


def test_a_circle_through_a_package_is_found():
    modules = parse(
        {"layup_hf/fleet/__init__.py": "from .group import G", "layup_hf/fleet/group.py": "from . import G"}
    )
    assert circle(modules) == ["layup_hf.fleet", "layup_hf.fleet.group", "layup_hf.fleet"]


def test_transformers_is_found():
    texts = {"layup_hf/optim/a.py": "from transformers.utils import b", "layup_hf/trainer/c.py": "import transformers"}
    assert list(strangers(parse(texts))) == ["layup_hf.optim.a:1 imports transformers.utils"]


OWNER = """
class Owner:
    _shown: int
    _count = 0

    def __init__(self):
        self._kept, (self.open, self._pair) = 1, (2, 3)

    def _help(self):
        self._count += 1
        return self._kept + self._pair + self._shown + self.__dict__["_kept"]
"""


def read_by(text, path="layup_hf/blocks/other.py"):
    return [name for _, name, _ in intrusions(parse({"layup_hf/blocks/owner.py": OWNER, path: text}))]


def test_what_is_ones_own_may_be_read():
    assert read_by("") == []
    assert (
        read_by("import copy\nclass A:\n  def f(self):\n    self._a = 1\n    b = copy.copy(self)\n    b._a = 2") == []
    )
    assert read_by("class A:\n  @classmethod\n  def f(cls):\n    a = cls()\n    a._b = 1\n    return a._b") == []
    assert read_by("class A:\n  def f(self):\n    self._a = 1\n    return lambda: self._a") == []
    assert read_by("_a = 1\ndef f():\n  return _a") == []
    assert read_by("class A:\n  def f(self):\n    return self.__class__, super().__init__()") == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("def f(owner):\n  return owner._kept", "_kept"),
        ("def f(owner):\n  owner._kept = 1", "_kept"),
        ("def f(owner):\n  return getattr(owner, '_kept', 0)", "_kept"),
        ("def f(owner):\n  return vars(owner)['_kept']", "_kept"),
        ("class A:\n  def f(self, owner):\n    return owner._help()", "_help"),
        ("class A:\n  def __init__(self, owner):\n    self._owner = owner\n    self._owner._kept = 1", "_kept"),
        ("class A:\n  def __init__(self, other):\n    self._a = other._a", "_a"),
        ("class A:\n  def f(self):\n    return self._a", "_a"),
        ("class A:\n  _a = 1\n  def f(cls):\n    b = cls()\n  def g(self, b):\n    return b._a", "_a"),
        ("class A:\n  def f(self):\n    self._a += 1", "_a"),
        ("class A:\n  def f(self):\n    class B:\n      _b = 1\n    return self._b", "_b"),
        ("class A(Owner):\n  def f(self):\n    return self._kept", "_kept"),
        ("class A(owner.Owner):\n  def f(self):\n    self._kept = 1", "_kept"),
        ("class A(Owner):\n  def f(self):\n    return super()._help()", "_help"),
        ("class A(Owner): ...\nclass B(A):\n  def f(self):\n    return self._help()", "_help"),
        ("from .owner import _helper", "_helper"),
        ("from ._hidden import helper", "_hidden"),
        ("import layup_hf._hidden", "_hidden"),
    ],
)
def test_what_is_anothers_may_not(text, name):
    assert read_by(text) == [name]


# ---- The mixin ----


def test_the_mixin_forwards_and_keeps_one_attribute(package):
    """No state is shared through `self`: nothing is inherited from but the Trainer, and one private name is set."""
    (mixin,) = (node for node in package["layup_hf.trainer.mixin"][1].body if getattr(node, "name", "") == "LayupMixin")
    assert LayupMixin.__bases__ == (object,)
    touched = members(package["layup_hf.trainer.mixin"][1])
    kept = {name for kind, method, owner, name, _, _ in touched if kind is mixin and is_self(owner, method)}
    assert kept == {"_layup"}
    longest = max(node.end_lineno - node.lineno for node in mixin.body if isinstance(node, ast.FunctionDef))
    assert longest <= 25, "a method of the mixin only hands on"
