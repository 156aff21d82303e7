"""JSON Schema's keywords: which are enforced, which only describe, and which cannot be enforced.

The engine's library is llguidance; what it enforces is held to this table by a test.
"""

# A schema, a list of schemas, or an object of schemas is the keyword's value
SCHEMA = frozenset({"items", "additionalItems", "additionalProperties"})
SCHEMA_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
SCHEMA_MAPS = frozenset({"$defs", "definitions", "properties", "patternProperties"})

VALUES = frozenset(
    {
        "$anchor",
        "$id",
        "$ref",
        "$schema",
        "const",
        "enum",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minItems",
        "minLength",
        "minProperties",
        "minimum",
        "multipleOf",
        "pattern",
        "required",
        "type",
    }
)
ENFORCED = SCHEMA | SCHEMA_LISTS | SCHEMA_MAPS | VALUES

# Keyword: values with which it allows everything
NOT_ENFORCED: dict[str, tuple[object, ...]] = {
    "$dynamicRef": (),
    "$recursiveRef": (),
    "contains": (),
    "dependencies": ({},),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "if": (),
    "not": (False,),
    "propertyNames": (True, {}),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "uniqueItems": (False,),
}

# Others describe, as the standard has it: `color` asks for nothing
FORMATS = frozenset(
    {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"}
)

# What llguidance's regular expressions lack: they are automata
LOOKAROUNDS = ("(?=", "(?!", "(?<=", "(?<!")
