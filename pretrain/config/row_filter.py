"""The grammar of `where`, which chooses rows by their fields: `language == "en" and not (score < 3 or score is null)`.

    condition   = all { "or" all }
    all         = one { "and" one }
    one         = "not" one | "(" condition ")" | field test
    test        = operator literal | [ "not" ] "in" "(" literal { "," literal } ")" | "is" [ "not" ] "null"
    operator    = "==" | "!=" | "<" | "<=" | ">" | ">="
    literal     = number | "string" | 'string' | "true" | "false"
    field       = name { "." name } | `any name`

Keywords are read in any case. Nothing is evaluated as code: this module only makes a tree, whose meaning is
defined by `pretrain.data.row_filter`.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NoReturn

Operator = Literal["==", "!=", "<", "<=", ">", ">="]
Value = str | int | float | bool

_MAX_DEPTH = 50  # of parentheses and `not`, so that no condition exhausts the stack


@dataclass(frozen=True, slots=True)
class Comparison:
    """A field compared with a literal."""

    field: str
    operator: Operator
    value: Value


@dataclass(frozen=True, slots=True)
class Membership:
    """Whether a field equals one of several literals, or, if `negated`, none of them."""

    field: str
    values: tuple[Value, ...]
    negated: bool


@dataclass(frozen=True, slots=True)
class IsNull:
    """Whether a field is null or missing, or, if `negated`, neither."""

    field: str
    negated: bool


@dataclass(frozen=True, slots=True)
class Not:
    """The opposite of a condition."""

    operand: "Condition"


@dataclass(frozen=True, slots=True)
class Junction:
    """All (`and`) or any (`or`) of several conditions."""

    operator: Literal["and", "or"]
    operands: tuple["Condition", ...]


Condition = Comparison | Membership | IsNull | Not | Junction


@lru_cache(maxsize=64)
def parse_condition(text: str) -> Condition:
    """Parse a condition.

    Raises:
        ValueError: it does not follow the grammar; the message shows the place.

    """
    return _Parser(text).parse()


def condition_fields(condition: Condition) -> tuple[str, ...]:
    """Return the fields that a condition names, each once, in order."""
    return tuple(dict.fromkeys(_fields(condition)))


def _fields(condition: Condition) -> Iterator[str]:
    if isinstance(condition, Not):
        yield from _fields(condition.operand)
    elif isinstance(condition, Junction):
        for operand in condition.operands:
            yield from _fields(operand)
    else:
        yield condition.field


_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))
      | (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
      | (?P<quoted>`[^`]+`)
      | (?P<name>[^\W\d]\w*(?:[.-]\w+)*)
      | (?P<symbol>==|!=|<=|>=|<|>|\(|\)|,)
      | (?P<end>$)
    )""",
    re.VERBOSE | re.DOTALL,
)
_KEYWORDS = ("and", "or", "not", "in", "is", "null", "true", "false")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    place: int


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[_Token] = []
        place = 0
        while not self._tokens or self._tokens[-1].kind != "end":
            match = _TOKEN.match(text, place)
            if match is None:
                place += len(text[place:]) - len(text[place:].lstrip())
                hint = "; write == to compare" if text[place] == "=" else ""
                self._fail(f"cannot read {text[place : place + 12]!r}{hint}", place)
            kind = match.lastgroup or ""
            content = match[kind]
            if kind == "name" and content.lower() in _KEYWORDS:
                kind, content = "keyword", content.lower()
            self._tokens.append(_Token(kind, content, match.start(match.lastgroup or 0)))
            place = match.end()
        self._at = 0
        self._depth = 0

    def parse(self) -> Condition:
        condition = self._any()
        if self._next.kind != "end":
            self._expected("`and`, `or` or the end")
        return condition

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _take(self, *texts: str) -> str | None:
        """Move past the next token and return its text if it is one of these keywords or symbols."""
        token = self._next
        if token.kind not in ("keyword", "symbol") or token.text not in texts:
            return None
        self._at += 1
        return token.text

    def _need(self, text: str) -> None:
        if not self._take(text):
            self._expected(f"`{text}`")

    def _any(self) -> Condition:
        operands = [self._all()]
        while self._take("or"):
            operands.append(self._all())
        return operands[0] if len(operands) == 1 else Junction("or", tuple(operands))

    def _all(self) -> Condition:
        operands = [self._one()]
        while self._take("and"):
            operands.append(self._one())
        return operands[0] if len(operands) == 1 else Junction("and", tuple(operands))

    def _one(self) -> Condition:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            self._fail(f"is nested more than {_MAX_DEPTH} deep", self._next.place)
        if self._take("not"):
            found: Condition = Not(self._one())
        elif self._take("("):
            found = self._any()
            self._need(")")
        else:
            found = self._test()
        self._depth -= 1
        return found

    def _test(self) -> Condition:
        token = self._next
        if token.kind not in ("name", "quoted"):
            self._expected("the name of a field")
        self._at += 1
        field = token.text.strip("`")
        if operator := self._take("==", "!=", "<", "<=", ">", ">="):
            place, value = self._next.place, self._literal()
            if isinstance(value, bool) and operator not in ("==", "!="):
                self._fail("true and false have no order", place)
            return Comparison(field, operator, value)  # type: ignore[arg-type]
        if self._take("is"):
            negated = bool(self._take("not"))
            self._need("null")
            return IsNull(field, negated)
        negated = bool(self._take("not"))
        if not self._take("in"):
            self._expected("`in`" if negated else "a comparison, `in` or `is null`")
        self._need("(")
        values = [self._literal()]
        while self._take(","):
            values.append(self._literal())
        self._need(")")
        return Membership(field, tuple(values), negated)

    def _literal(self) -> Value:
        token = self._next
        self._at += 1
        if token.kind == "string":
            return self._string(token)
        if token.kind == "number":
            return self._number(token)
        if token.kind == "keyword" and token.text in ("true", "false"):
            return token.text == "true"
        self._at -= 1
        if token.text == "null":
            self._fail("nothing equals null: write `is null` or `is not null`", token.place)
        self._expected("a number, a string in quotes, true or false")

    def _string(self, token: _Token) -> str:
        def unescape(match: re.Match[str]) -> str:
            if match[1] not in _ESCAPES:
                self._fail(f"unknown escape {match[0]!r}", token.place)
            return _ESCAPES[match[1]]

        return re.sub(r"\\(.)", unescape, token.text[1:-1], flags=re.DOTALL)

    def _number(self, token: _Token) -> int | float:
        try:
            return int(token.text)
        except ValueError:
            number = float(token.text)
        if not math.isfinite(number):
            self._fail(f"{token.text} is not a finite number", token.place)
        return number

    def _expected(self, wanted: str) -> NoReturn:
        got = f"got {self._next.text!r}" if self._next.kind != "end" else "but it ends"
        self._fail(f"expected {wanted}, {got}", self._next.place)

    def _fail(self, problem: str, place: int) -> NoReturn:
        raise ValueError(f"{problem} at character {place + 1} of {self._text!r}")
