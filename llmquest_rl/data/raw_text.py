"""Raw text for next-token reasoning: documents, or questions with answers, and the parts that a proxy scores."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from llmquest_rl.data.documents import read_documents
from llmquest_rl.data.files import read_rows
from llmquest_rl.data.rows import DataError, MalformedRows, Row, Rows, held_out_keys
from llmquest_rl.data.token_scores import ProxyModel, cut
from llmquest_rl.options import Options

Paths = str | tuple[str, ...]


class Columns(Options):
    """The role of each column."""

    text: str = "text"
    """The text of a row, which is one document."""
    question: str | None = None
    """A question. With it a row is a question with its answer, and `text` is not read; null = rows are documents."""
    answer: str = "answer"
    """The answer to the question."""


@dataclass(frozen=True, slots=True)
class RawText:
    """One document."""

    id: str
    """Where the document is."""
    text: str
    start: int = 0
    """First character that may be predicted."""


@dataclass(frozen=True, slots=True)
class Source:
    """A place of text."""

    subset: str | None
    split: str
    columns: Columns
    separator: str
    """Text between a question and its answer."""
    limit: int | None
    """Maximum number of documents."""

    def read(self, paths: Paths, malformed: MalformedRows) -> list[RawText]:
        """The documents of files or of the Hub.

        Raises:
            DataError: a file or column is missing, or a row is malformed and `data.malformed_rows` is `error`.
        """
        found = self._documents(paths, malformed) if self.columns.question is None else self._answers(paths, malformed)
        return list(islice(found, self.limit))

    def _documents(self, paths: Paths, malformed: MalformedRows) -> Iterator[RawText]:
        for where, text in read_documents(paths, self.subset, self.split, self.columns.text, malformed):
            yield RawText(where, text)

    def _answers(self, paths: Paths, malformed: MalformedRows) -> Iterator[RawText]:
        question, answer = self.columns.question, self.columns.answer
        for path in [paths] if isinstance(paths, str) else paths:
            for number, (where, row) in enumerate(read_rows(path, self.subset, self.split, malformed)):
                missing = [name for name in (question, answer) if name not in row]
                if missing and number == 0:
                    raise DataError(f"{where} has no column {missing[0]!r} (columns); it has: {', '.join(row)}")
                yield from self._answered(where, row.get(str(question)), row.get(answer), malformed)

    def of_rows(self, rows: Rows, count: int, malformed: MalformedRows) -> list[RawText]:
        """The first problems of a task, as questions with their gold answers."""
        taken: Iterable[Row] = map(rows.row, range(count if rows.size is None else min(count, rows.size)))
        return [text for row in taken for text in self._answered(row.id, row.prompt, row.answer, malformed)]

    def _answered(self, where: str, question: object, answer: object, malformed: MalformedRows) -> Iterator[RawText]:
        if not isinstance(question, str) or answer is None or not str(answer).strip():
            malformed.report(where, "a question must be a text and its answer must not be empty")
            return
        before = f"{question}{self.separator}"
        yield RawText(where, f"{before}{answer}", len(before))


@dataclass(frozen=True, slots=True)
class Part:
    """A document, or a part of a long one, as tokens."""

    document: RawText
    text: str
    start: int
    """First character of the part that may be predicted."""
    ids: list[int]
    ends: list[int]


def parts_of(document: RawText, length: int, proxy: ProxyModel) -> Iterator[Part]:
    """Cut a document into parts of at most `length` tokens.

    Raises:
        DataError: the proxy has another tokenizer than the model that is trained.
    """
    tokens = proxy.tokens(document.text)
    for first, stop in cut(tokens, length):
        begin = tokens.ends[first - 1] if first else 0
        end = tokens.ends[stop - 1] if stop < len(tokens.ids) else len(document.text)
        ends = [place - begin if place >= 0 else place for place in tokens.ends[first:stop]]
        start = max(0, document.start - begin)
        yield Part(document, document.text[begin:end], start, tokens.ids[first:stop], ends)


def held_out_parts(parts: Sequence[Part], share: float, seed: int) -> list[bool]:
    """Whether each part is held out: a share of the documents, or of the parts if there is only one document.

    Raises:
        DataError: there is one part, so it cannot be divided.
    """
    documents = {part.document.text for part in parts}
    names = [part.document.text if len(documents) > 1 else part.text for part in parts]
    keys = held_out_keys(names, share, seed)
    return [name in keys for name in names]
