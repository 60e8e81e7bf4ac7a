"""A saved workflow as the prompt that the queue takes, and what is wrong with it, if anything."""

from __future__ import annotations

from typing import Any

from .definitions import inputs_of, outputs_of

NOTES = ("MarkdownNote", "Note")


def to_prompt(workflow: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """The API format of a workflow; notes are left out."""
    links = {link[0]: link for link in workflow["links"]}
    prompt: dict[str, Any] = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES or node["mode"] in (2, 4):
            continue
        values = list(node["widgets_values"])
        inputs: dict[str, Any] = {}
        for spec in inputs_of(info[node["type"]]):
            if spec.is_widget:
                inputs[spec.name] = values.pop(0)
                if spec.has_control:
                    values.pop(0)
        for entry in node["inputs"]:
            if entry["link"] is not None:
                _, source, slot, *_ = links[entry["link"]]
                inputs[entry["name"]] = [str(source), slot]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def problems(workflow: dict[str, Any], info: dict[str, Any]) -> list[str]:
    """What does not fit the node definitions: unknown nodes, sockets, types, choices or numbers."""
    found: list[str] = []
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        if node["type"] not in info:
            found.append(f"node type {node['type']} is unknown")
            continue
        found += [f"{node['type']} {node['id']}: {problem}" for problem in _node_problems(node, info[node["type"]])]
    by_id = {node["id"]: node for node in workflow["nodes"]}
    for number, source, slot, target, _, kind in workflow["links"]:
        output = by_id[source]["outputs"][slot]
        if number not in output["links"] or (kind not in (output["type"], "*") and output["type"] != "*"):
            found.append(f"link {number} from node {source} to node {target} does not fit ({output['type']} -> {kind})")
    return found


def _node_problems(node: dict[str, Any], info: dict[str, Any]) -> list[str]:
    found = []
    specs = inputs_of(info)
    values = list(node["widgets_values"])
    connected = {entry["name"] for entry in node["inputs"] if entry["link"] is not None}
    names = [name for name, _ in outputs_of(info)]
    # Newer releases of ComfyUI let display nodes pass their input on: an older one lacks an output nothing hangs on.
    surplus = node["outputs"][len(names) :]
    if [output["name"] for output in node["outputs"][: len(names)]] != names or any(o["links"] for o in surplus):
        found.append("outputs have changed")
    for spec in specs:
        if not spec.is_widget:
            if not spec.optional and spec.name not in connected:
                found.append(f"{spec.name} is not connected")
            continue
        if not values:
            found.append(f"no value for {spec.name}")
            break
        value = values.pop(0)
        if spec.has_control:
            values.pop(0)
        if spec.name not in connected:
            found += _value_problem(spec, value)
    if values:
        found.append(f"{len(values)} values too many")
    known = {spec.name for spec in specs}
    return found + [f"input {name} does not exist" for name in connected - known]


def _value_problem(spec: Any, value: Any) -> list[str]:
    if spec.choices == ["(nothing found)"]:  # a list of what lies in a folder, which differs between machines
        return []
    if spec.choices is not None:
        return [] if value in spec.choices else [f"{spec.name} is {value!r}, not one of {spec.choices}"]
    kinds = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
    if not isinstance(value, kinds[spec.type]):
        return [f"{spec.name} is {value!r}, not {spec.type}"]
    if spec.type in ("INT", "FLOAT"):
        low, high = spec.options.get("min"), spec.options.get("max")
        if (low is not None and value < low) or (high is not None and value > high):
            return [f"{spec.name} is {value}, outside {low} to {high}"]
    return []
