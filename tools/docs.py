"""Writes the tables in the READMEs from the code, between markers: `make docs`.

In workers/<name>/README.md:
    <!-- settings --> ... <!-- /settings -->                    the environment, from Settings in schemas.py
    <!-- fields EmbedRequest --> ... <!-- /fields -->            a pydantic model of schemas.py
In README.md:
    <!-- workers --> ... <!-- /workers -->                       a line for each worker
In deploy/README.md, the keys of deploy.toml.

With --check it writes nothing and fails when a table is not what the code says.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from deploy import config
from shared import settings
from tools.bake import table as bake_table
from tools.workers import ROOT, load_module, worker_names

MARKED = re.compile(r"(<!-- (settings|fields|workers) ?([\w.]*) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
Schema = dict[str, Any]


def bounds(schema: Schema) -> str:
    """`1 to 1024`, `more than 0, at most 20`, `not empty`; of lists and texts it is the length."""
    if schema.get("minLength", schema.get("minItems")) == 1 and not {"maxLength", "maxItems"} & schema.keys():
        return "not empty"
    low = schema.get("minimum", schema.get("minItems", schema.get("minLength")))
    high = schema.get("maximum", schema.get("maxItems", schema.get("maxLength")))
    words = []
    if "exclusiveMinimum" in schema:
        words.append(f"more than {schema['exclusiveMinimum']}")
    if low is not None and high is not None:
        words.append(f"{low} to {high}")
    elif low is not None:
        words.append(f"at least {low}")
    elif high is not None:
        words.append(f"at most {high}")
    if "exclusiveMaximum" in schema:
        words.append(f"less than {schema['exclusiveMaximum']}")
    unit = {"array": " items", "string": " characters"}.get(schema.get("type", ""), "")
    return ", ".join(words) + (unit if words else "")


def kind(schema: Schema, definitions: Schema) -> str:
    """The type of a field in JSON's words, with its bounds or its choices."""
    if "$ref" in schema:
        return kind(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "const" in schema:
        return code(schema["const"])
    if "enum" in schema:
        return ", ".join(code(choice) for choice in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(
            kind(option, definitions) for option in schema["anyOf"] if option.get("type") != "null"
        )
    name = schema.get("type", "any")
    if name == "array" and "items" in schema:
        name = f"list of {kind(schema['items'], definitions)}"
    limits = bounds(schema)
    return f"{name}, {limits}" if limits else name


def code(value: Any) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def inner(schema: Schema, definitions: Schema) -> tuple[str, Schema] | None:
    """The object inside a field and how it is reached: `.` itself, `[].` an item of a list."""
    options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    for option in options:
        dots = "[]." if option.get("type") == "array" else "."
        target = option.get("items", {}) if dots == "[]." else option
        if "$ref" in target:
            target_schema = definitions[target["$ref"].rpartition("/")[2]]
            if "properties" in target_schema:
                return dots, target_schema
    return None


def fields(schema: Schema, definitions: Schema, prefix: str = "") -> Iterator[list[str]]:
    """A row for each field: name, type, default, description; objects inside follow with dotted names."""
    for name, field in schema["properties"].items():
        if name in schema.get("required", ()):
            default = "required"
        elif field.get("default") is None:
            default = "unset"
        else:
            default = code(field["default"])
        description = field.get("description", "").replace("<", "&lt;")
        yield [code(prefix + name), kind(field, definitions), default, description]
        nested = inner(field, definitions)
        if nested and prefix.count(".") < 2:
            yield from fields(nested[1], definitions, f"{prefix}{name}{nested[0]}")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def model_table(model: type[BaseModel], first: str, *, upper: bool = False) -> str:
    schema = model.model_json_schema()
    rows = list(fields(schema, schema.get("$defs", {})))
    if upper:
        rows = [[row[0].upper(), *row[1:]] for row in rows]
    head = [first, "Type", "Default", "Description"]
    if all(row[2] == "required" for row in rows):  # a response: nothing has a default
        head, rows = [head[0], *head[1::2]], [[row[0], *row[1::2]] for row in rows]
    return markdown(head, rows)


def workers_table(root: Path = ROOT) -> str:
    rows = []
    for name, row in sorted(bake_table(root).items()):
        default = find_model(load_module(name, "schemas"), "Settings").model_fields["model_name"].default
        model = f"`{default}`" if isinstance(default, str) else "set `MODEL_NAME`"
        rows.append([f"[{name}](workers/{name}/README.md)", row["about"], model])
    return markdown(["Worker", "What it does", "Default model"], rows)


def find_model(module: ModuleType, name: str) -> type[BaseModel]:
    """The model `name` of a worker's schemas. Raises SystemExit that names those that there are."""
    models = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, BaseModel) and value.model_fields
    }
    if name not in models:
        file = module.__name__.replace(".", "/") + ".py"
        there = ", ".join(sorted(models.keys() - {"WorkerSettings"})) or "none"
        raise SystemExit(f"{file} has no model {name}. Its models: {there}.")
    return models[name]


def render(text: str, module: ModuleType | None, root: Path = ROOT) -> str:
    """`text` with everything between markers replaced by what the code says now.

    module: the worker's schemas; None for the root's README, which has only the table of workers.
    Raises SystemExit when a marker names a model that the schemas do not have.
    """

    def table(match: re.Match[str]) -> str:
        opening, what, name, closing = match.groups()
        if what == "workers":
            return opening + workers_table(root) + closing
        assert module is not None, f"{opening.strip()} belongs into the README of a worker"
        if what == "settings":
            return (
                opening
                + model_table(find_model(module, name or "Settings"), "Variable", upper=True)
                + closing
            )
        return opening + model_table(find_model(module, name), "Field") + closing

    return MARKED.sub(table, text)


def stale(root: Path = ROOT, *, write: bool = False) -> list[str]:
    """The READMEs whose tables are not what the code says; with `write`, they are written."""
    pages: list[tuple[Path, ModuleType | None]] = [(root / "README.md", None), (root / "HTTP.md", settings)]
    if (page := root / "deploy" / "README.md").exists():
        pages.append((page, config))
    for name in worker_names(root):
        if (page := root / "workers" / name / "README.md").exists():
            pages.append((page, load_module(name, "schemas")))
    pages_stale = []
    for page, module in pages:
        text = page.read_text()
        try:
            new = render(text, module, root)
        except SystemExit as error:
            raise SystemExit(f"{page.relative_to(root)}: a table cannot be written: {error}") from None
        if new != text:
            pages_stale.append(str(page.relative_to(root)))
            if write:
                page.write_text(new)
    return pages_stale


def main() -> None:
    check = "--check" in sys.argv[1:]
    pages = stale(write=not check)
    for page in pages:
        print(f"{page}: {'not what the code says; run make docs' if check else 'written'}")
    sys.exit(bool(check and pages))


if __name__ == "__main__":
    main()
