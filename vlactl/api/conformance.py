"""What every plugin must hold to: `vlactl plugins check NAME`, or `check` in an author's tests.

The checks start no simulator and load no network. Descriptors, specs and footprints are tried in
a process of their own, where it shows which heavy library they import.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

from pydantic import BaseModel, ValidationError

from vlactl.api import registry
from vlactl.api.contracts import EnvSpec
from vlactl.api.plugins import (
    Descriptor,
    EnvironmentPlugin,
    Finding,
    Footprint,
    ModelPlugin,
    PluginConfig,
    load_object,
)
from vlactl.errors import UserError

HEAVY = ("torch", "transformers", "mujoco", "gymnasium", "jax")
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_PROBE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from vlactl.api.conformance import probe; probe(*sys.argv[2:])"
)
_PROBE_SECONDS = 120
_TRIED_LORA_RANK = 8


def check(kind: str, name: str) -> list[Finding]:
    """Examine one installed plugin; findings of level "FAIL" break the contract.

    Args:
        kind: "environment", "model", "algorithm" or "sink".
        name: of the plugin.
    """
    try:
        descriptor = registry.find(kind, name)
    except UserError as error:
        return [Finding(level="FAIL", subject="descriptor", detail=error.message, fix=error.hint)]
    return [
        Finding(level="ok", subject="descriptor", detail=f"plugin api {descriptor.api_version}"),
        *_check_name(descriptor),
        *_check_config(descriptor),
        *_check_references(descriptor),
        *_check_requirements(descriptor),
        *_probe_in_process(kind, descriptor),
    ]


def failed(findings: list[Finding]) -> bool:
    """Whether one of them breaks the contract."""
    return any(finding.level == "FAIL" for finding in findings)


# --------------------------------------------------------------------------------------------
# Without running the plugin
# --------------------------------------------------------------------------------------------
def _check_name(descriptor: Descriptor) -> Iterator[Finding]:
    if not _NAME.fullmatch(descriptor.name):
        yield Finding(
            level="warn",
            subject="name",
            detail=f'"{descriptor.name}"',
            fix="use lower-case letters, digits and hyphens",
        )
    if not descriptor.summary or "\n" in descriptor.summary:
        yield Finding(level="FAIL", subject="summary", fix="write one line")


def _check_config(descriptor: Descriptor) -> Iterator[Finding]:
    subject = f"config {descriptor.config.__name__}"
    mistakes = [
        f"{model.__name__} {mistake}"
        for model in _models(descriptor.config)
        for mistake in _model_mistakes(model)
    ]
    try:
        defaults = default_config(descriptor)
    except ValidationError as error:
        missing = ", ".join(".".join(map(str, e["loc"])) for e in error.errors())
        mistakes.append(f"cannot be built from defaults: {missing}")
    else:
        if defaults.name != descriptor.name:
            mistakes.append(f'is called "{defaults.name}"')
    for mistake in mistakes:
        yield Finding(level="FAIL", subject=subject, detail=mistake)
    if not mistakes:
        yield Finding(level="ok", subject=subject, detail="frozen, no unknown keys, has defaults")
    undocumented = [
        name for name, field in descriptor.config.model_fields.items() if not field.description
    ]
    # `name` and the keys of the base classes are documented there; overriding one drops that text.
    undocumented = [name for name in undocumented if name not in _inherited(descriptor.config)]
    if undocumented:
        yield Finding(
            level="warn",
            subject=subject,
            detail=f"keys without a description: {', '.join(undocumented)}",
            fix="Field(..., description=...)",
        )


def _model_mistakes(model: type[BaseModel]) -> Iterator[str]:
    if not model.model_config.get("frozen"):
        yield "is not frozen"
    if model.model_config.get("extra") != "forbid":
        yield "accepts unknown keys"


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A config class and those of its tables."""
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _models(field.annotation)


def _inherited(config: type[PluginConfig]) -> set[str]:
    return {
        name
        for base in config.__mro__[1:]
        if issubclass(base, PluginConfig)
        for name in base.model_fields
    }


def _check_references(descriptor: Descriptor) -> Iterator[Finding]:
    for field, reference in _references(descriptor).items():
        if not _REFERENCE.fullmatch(reference):
            yield Finding(
                level="FAIL", subject=field, detail=f'"{reference}"', fix='write "module:function"'
            )


def _references(descriptor: Descriptor) -> dict[str, str]:
    references = {"factory": descriptor.factory}
    if descriptor.checks:
        references["checks"] = descriptor.checks
    if isinstance(descriptor, EnvironmentPlugin):
        references["spec"] = descriptor.spec
    if isinstance(descriptor, ModelPlugin):
        references["footprint"] = descriptor.footprint
    return references


def _check_requirements(descriptor: Descriptor) -> Iterator[Finding]:
    for requirement in descriptor.requirements:
        problem = registry.unmet(requirement)
        if problem:
            yield Finding(
                level="warn", subject="requirements", detail=problem, fix=requirement.install
            )


def default_config(descriptor: Descriptor) -> PluginConfig:
    """The plugin's section with nothing but its name set.

    Raises:
        ValidationError: a key has no default.
    """
    return descriptor.config.model_validate({"name": descriptor.name})


# --------------------------------------------------------------------------------------------
# In a process of its own
# --------------------------------------------------------------------------------------------
def _probe_in_process(kind: str, descriptor: Descriptor) -> list[Finding]:
    """Run `probe` in a fresh interpreter with this one's search path."""
    command = [sys.executable, "-c", _PROBE, json.dumps(sys.path), kind, descriptor.name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=True
        )
        values = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        detail = f"still running after {_PROBE_SECONDS} s"
        return [Finding(level="FAIL", subject="import", detail=detail)]
    except subprocess.CalledProcessError as error:
        cause = (error.stderr.strip() or "no message").splitlines()[-1]
        return [Finding(level="FAIL", subject="import", detail=cause)]
    return [Finding(**value) for value in values]


def probe(kind: str, name: str) -> None:
    """Import a descriptor, try its spec or footprint, and write the findings to stdout as JSON."""
    descriptor = registry.find(kind, name)
    findings = [_imports(f"descriptor {descriptor.config.__module__}")]
    ready = not any(map(registry.unmet, descriptor.requirements))
    if isinstance(descriptor, EnvironmentPlugin) and ready:
        findings += _try("spec", descriptor, _spec_mistakes)
    if isinstance(descriptor, ModelPlugin):
        findings += _try("footprint", descriptor, _footprint_mistakes)
    fields = ("level", "subject", "detail", "fix")
    report = [{field: getattr(finding, field) for field in fields} for finding in findings]
    sys.stdout.write(f"\n{json.dumps(report)}\n")


def _imports(subject: str) -> Finding:
    heavy = [module for module in HEAVY if module in sys.modules]
    if not heavy:
        return Finding(level="ok", subject=subject, detail="imports nothing heavy")
    return Finding(
        level="FAIL",
        subject=subject,
        detail=f"imports {', '.join(heavy)}",
        fix="move the import into the function that needs it",
    )


def _try(
    subject: str, descriptor: Descriptor, mistakes: Callable[[Descriptor], Iterator[str]]
) -> list[Finding]:
    """Findings about a function that the plan calls, so that it too has to be cheap."""
    try:
        found = [
            Finding(level="FAIL", subject=subject, detail=text) for text in mistakes(descriptor)
        ]
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        return [Finding(level="FAIL", subject=subject, detail=detail)]
    return [*found, _imports(subject)]


def _spec_mistakes(descriptor: Descriptor) -> Iterator[str]:
    assert isinstance(descriptor, EnvironmentPlugin)
    spec = load_object(descriptor.spec)(default_config(descriptor))
    if not isinstance(spec, EnvSpec):
        yield f"returns a {type(spec).__name__}, not an EnvSpec"
        return
    if not spec.cameras or any(min(size) < 1 for size in spec.cameras.values()):
        yield "cameras: at least one, each with a height and a width"
    if spec.action_dim < 1 or spec.max_episode_steps < 1 or spec.control_hz <= 0:
        yield "action_dim, max_episode_steps and control_hz must be positive"
    if spec.state_dim < 0:
        yield "state_dim must not be negative"
    yield from _task_mistakes(spec)


def _task_mistakes(spec: EnvSpec) -> Iterator[str]:
    if not spec.tasks:
        yield "tasks: at least one"
    if [task.index for task in spec.tasks] != list(range(len(spec.tasks))):
        yield "tasks: indices must be 0, 1, 2, ... in this order"
    if len({task.name for task in spec.tasks}) != len(spec.tasks):
        yield "tasks: names must be unique"
    for task in spec.tasks:
        if task.num_trials < 1 or not task.instruction:
            yield f'task "{task.name}": needs an instruction and at least one trial'


def _footprint_mistakes(descriptor: Descriptor) -> Iterator[str]:
    assert isinstance(descriptor, ModelPlugin)
    footprint = load_object(descriptor.footprint)
    for lora_rank in (0, _TRIED_LORA_RANK):
        size = footprint(default_config(descriptor), lora_rank)
        if not isinstance(size, Footprint):
            yield f"returns a {type(size).__name__}, not a Footprint"
        elif not 0 < size.trainable <= size.parameters:
            yield f"trainable parameters for lora rank {lora_rank}: {size.trainable}"
        elif size.bytes_per_parameter < 1 or size.activation_bytes < 0:
            yield "bytes_per_parameter and activation_bytes must be positive"
