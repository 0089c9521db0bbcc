"""Constraints by their sources."""

import json

from server.engine.constraint import Constraint, ConstraintKind


def schema(value: object) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(value))


def regex(source: str) -> Constraint:
    return Constraint(ConstraintKind.REGEX, source)


def lark(source: str) -> Constraint:
    return Constraint(ConstraintKind.GRAMMAR, source)
