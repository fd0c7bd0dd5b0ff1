"""The example in the kit's docstring is a test, and a short one."""

from __future__ import annotations

import inspect
import textwrap

from p2pllm import testing


def test_the_example_runs() -> None:
    text = inspect.cleandoc(testing.__doc__ or "")
    begin, end = text.index("    from p2pllm"), text.index("That is a whole test file.")
    example = textwrap.dedent(text[begin:end])
    assert len([line for line in example.splitlines() if line]) <= 16
    names: dict[str, object] = {}
    exec(compile(example, "the example", "exec"), names)  # noqa: S102 - it is our own
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()  # type: ignore[operator]


def test_everything_public_is_there_and_described() -> None:
    for name in testing.__all__:
        assert inspect.getdoc(getattr(testing, name)), name
