"""A search that finds Chinese, where words are not set apart: every two characters are a word.

That needs no dictionary, and finds what stands within a longer word. What is searched for is split
in the same way, by the script of the page.
"""

import re
from itertools import pairwise

from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish

_RUN = re.compile(r"[\u3400-\u9fff]+|[^\u3400-\u9fff]+")


class _WithChinese(SearchEnglish):
    js_splitter_code = r"""
var splitQuery = (query) => {
  const words = query.match(/[\p{Letter}\p{Number}_]+/gu) ?? [];
  const runs = words.flatMap((word) => word.match(/[\u3400-\u9fff]+|[^\u3400-\u9fff]+/g));
  const pairs = (run) => [...run].slice(1).map((second, i) => run[i] + second);
  return runs.flatMap((run) => (/[\u3400-\u9fff]{2}/.test(run) ? pairs(run) : [run]));
};
"""

    def split(self, input: str) -> list[str]:
        runs = (run for word in super().split(input) for run in _RUN.findall(word))
        return [part for run in runs for part in _parts(run)]


class _OfChinesePages(_WithChinese):
    lang = "zh"


def _parts(run: str) -> list[str]:
    """Return every two characters of a Chinese run, and any other run whole."""
    is_chinese = "\u3400" <= run[0] <= "\u9fff" and len(run) > 1
    return ["".join(pair) for pair in pairwise(run)] if is_chinese else [run]


def setup(app: Sphinx) -> dict[str, object]:
    app.add_search_language(_WithChinese)
    app.add_search_language(_OfChinesePages)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
