"""A question with its answers: each answer unfolds into whether it is right, and why.

    :::{quiz}
    Is the *likelihood* a density of the parameter?

    Yes, since it is never negative
    : Wrong. Its integral over the parameter need not be 1.

    No
    : Right. It is a density of the data.
    :::

Exactly one answer begins with "Right.", the others with "Wrong."; an answer takes one line. On a
page only one answer is open at a time, without a script; on paper the reasons follow the answers.
"""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective

_VERDICTS = {"Right.": "right", "Wrong.": "wrong"}


class _Quiz(SphinxDirective):
    has_content = True

    def run(self) -> list[nodes.Node]:
        quiz = nodes.container(quiz=self.env.new_serialno("quiz"), classes=["quiz"])
        self.state.nested_parse(self.content, self.content_offset, quiz)
        answers = list(quiz.findall(nodes.definition_list_item))
        for answer in answers:
            said = answer.next_node(nodes.definition).astext()
            answer["classes"].append(_VERDICTS.get(said.partition(" ")[0], "unclear"))
        verdicts = sorted(answer["classes"][-1] for answer in answers)
        if verdicts != ["right"] + ["wrong"] * max(1, len(answers) - 1):
            raise self.error('One answer begins with "Right.", the others with "Wrong."')
        return [quiz]


class _SetAnswers(SphinxPostTransform):
    default_priority = 100

    def run(self) -> None:
        for quiz in self.document.findall(lambda node: "quiz" in getattr(node, "attributes", ())):
            answers = quiz.next_node(nodes.definition_list)
            to_fold = self.app.builder.format == "html"
            shown = _folded(answers, quiz["quiz"]) if to_fold else _listed(answers)
            answers.parent.replace(answers, shown)


def _folded(answers: nodes.definition_list, number: int) -> list[nodes.Node]:
    found = list[nodes.Node]()
    for item in answers:
        answer, reason = item.next_node(nodes.term), item.next_node(nodes.definition)
        opening = f'<details class="{item["classes"][-1]}" name="quiz-{number}"><summary>'
        found += [_raw(opening), *answer.children, _raw("</summary>")]
        found += [*reason.children, _raw("</details>")]
    return found


def _raw(html: str) -> nodes.raw:
    return nodes.raw("", html, format="html")


def _listed(answers: nodes.definition_list) -> list[nodes.Node]:
    choices = [[nodes.paragraph("", "", *item.next_node(nodes.term).children)] for item in answers]
    reasons = [item.next_node(nodes.definition).children for item in answers]
    return [
        nodes.enumerated_list(
            "", *(nodes.list_item("", *text) for text in texts), enumtype="loweralpha", suffix=")"
        )
        for texts in (choices, reasons)
    ]


def setup(app: Sphinx) -> dict[str, object]:
    app.add_directive("quiz", _Quiz)
    app.add_post_transform(_SetAnswers)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
