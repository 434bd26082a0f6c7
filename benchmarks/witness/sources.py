"""The packages that the text comes from: version, SHA-256, licence, and where their pages are.

All are documentation packages of Debian 12, which `apt-get download` fetches and checks. Together
they hold the same manuals in more than thirty languages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Form = Literal["roff", "html", "mallard"]
_PAGES = {
    "manual pages": (
        "roff",
        r"usr/share/man/(?:(?P<language>[a-z]{2}[^/]*)/)?man\d/(?P<page>[^/]+)\.gz",
    ),
    "help of the GNOME desktop": (
        "mallard", r"usr/share/help/(?P<language>[^/]+)/(?P<page>[^/]+/[^/]+)\.page"
    ),
    "installation guide": (
        "html", r"usr/share/doc/installation-guide-amd64/(?P<language>[^/]+)/(?P<page>[^/]+)\.html"
    ),
    "handbook": (
        "html", r"usr/share/doc/debian-handbook/html/(?P<language>[^/]+)/(?P<page>[^/]+)\.html"
    ),
}  # fmt: skip
# Tags by how the packages spell them; of others the part before `-` or `_` is the tag.
_TAGS = {
    "C": "en", "sr@latin": "sr-Latn", "pt_BR": "pt-BR", "pt-BR": "pt-BR", "zh_TW": "zh-TW",
    "zh-TW": "zh-TW",
}  # fmt: skip
_L10N = "GPL-3.0-or-later; some pages as the originals"
# Package, version, SHA-256, what it is, licence. English comes first: what others leave
# untranslated then counts as English.
_TABLE = (
    ("manpages", "6.03-2", "efa1ba4cd19ad7baeae959c9209a7eb74be2ebb858bcabb412597bfc9f588c91",
     "manual pages", "GPL-2.0-or-later, Linux-man-pages-copyleft and others by page"),
    ("gnome-user-docs", "43.0-2",
     "0d635a840747958ca84da778b40d341f1155603851f922c9a171f5a181d6a39f",
     "help of the GNOME desktop", "CC-BY-SA-3.0"),
    ("installation-guide-amd64", "20230508+deb12u1",
     "812c43e1dc906daf671e3efe953dc023205c238e5bd5a3021ce4ca142793573a",
     "installation guide", "GPL-2.0-only"),
    ("debian-handbook", "11.20220922",
     "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
     "handbook", "GPL-2.0-or-later or CC-BY-SA-3.0"),
    ("manpages-cs", "4.18.1-1", "2c3c32887089fe16b173073cbd72fd5f000911f1b9b8f384f3f46e01fce39791",
     "manual pages", _L10N),
    ("manpages-da", "4.18.1-1", "977b0dee2ab0d0315cc8f0864dd1c89473ece240033e1651a1c23a62e66afff4",
     "manual pages", _L10N),
    ("manpages-de", "4.18.1-1", "37d2e7ee51f22952aecec3af93647ff59194a3c74bb7a694560f49c7f7ab3978",
     "manual pages", _L10N),
    ("manpages-el", "4.18.1-1", "79ae710057edfd437a6fcdbf27ed8a1a3e29ae785730282313ed31ff3f93a95d",
     "manual pages", _L10N),
    ("manpages-es", "4.18.1-1", "d21e9f85e487f149ae45b5c525b2b1a70ae7fd38d4b05b47c8753042c66f4c2b",
     "manual pages", _L10N),
    ("manpages-fi", "4.18.1-1", "a0491e7141cd540896388fd3d4f394fa96657838780bf7f213eb5e529b0880dd",
     "manual pages", _L10N),
    ("manpages-fr", "4.18.1-1", "ec29759cc0e4a44dc7719c1e32869d0060667049e584f09556f0d982b969ea33",
     "manual pages", _L10N),
    ("manpages-hu", "1:4.18.1-1",
     "f4f4556a25194958d08fe9c87c946294a1ad4bd2b265bdc71d9ae1883e5ea2cf", "manual pages", _L10N),
    ("manpages-id", "4.18.1-1", "b769b5398ecffe6db6e4170973a081bbd905e254ce768b34650ec1d1fb7ae9c2",
     "manual pages", _L10N),
    ("manpages-it", "4.18.1-1", "4b18e87cc1b6a930d40949ddc86fb8e84b50da1a862cd17e2a504eeb8e3b4e48",
     "manual pages", _L10N),
    ("manpages-ja", "0.5.0.0.20221215+dfsg-1",
     "4d270e9a1e83be4de0c072a110892a17dc9caa4b501257324006ac28d82c5743",
     "manual pages", "as the original pages, free ones alone"),
    ("manpages-mk", "4.18.1-1", "b0eb2409003de329e1e0e359f90a9204541501931a377b8d3c8bb3d4fbfc39fa",
     "manual pages", _L10N),
    ("manpages-nb", "4.18.1-1", "62f43554a179199b9cb95ecdf390f81e2eb779ff3f535c6b944ce0a647f15bb3",
     "manual pages", _L10N),
    ("manpages-nl", "4.18.1-1", "c1ac0e9fb2ff88a8d7f796042ce7d876fa8918e5d3367521c7f09dd885eb3b2d",
     "manual pages", _L10N),
    ("manpages-pl", "1:4.18.1-1",
     "31e518ea8331b5204d4fd0032037f96af1ba94a5afa4f0585dca1996b270cdf9", "manual pages", _L10N),
    ("manpages-pt-br", "4.18.1-1",
     "da971a7bc0107f7b74b4ae592d1d7cc6424fa7e77cc1808f5c110a07edaf3890", "manual pages", _L10N),
    ("manpages-ro", "4.18.1-1", "1d1d32dbc090850c1e796fd51156ae3852e1cc46a22d712493800182817f6024",
     "manual pages", _L10N),
    ("manpages-ru", "4.18.1-1", "5d5821dad5840652ba9c1c6b85bdc785c1fc52148a71c18fab6658c9659244c0",
     "manual pages", _L10N),
    ("manpages-sr", "4.18.1-1", "ea78e33605970a23b9d77a48249fb2d2e94372b0ff3e9b360c8e4f02d3d3dda0",
     "manual pages", _L10N),
    ("manpages-sv", "4.18.1-1", "12b386ce4e11fadf3c05b55a813c81df129d244606ba3383da586d39a4a8cca4",
     "manual pages", _L10N),
    ("manpages-tr", "2.0.6-2", "babf3ded00dd7c30db8fb333c1ff482fd5a52483d2bffec7557e3f78ed77eef1",
     "manual pages", "as the English originals; others GPL"),
    ("manpages-uk", "4.18.1-1", "7ad64b12010584a6cc10a341ba561a6774e8493166524f386bcd9fd7cbebdd5b",
     "manual pages", _L10N),
    ("manpages-vi", "4.18.1-1", "c3fb89f768663013c87babcad3fdd525588edb2c9a91a9d1c74dc33c1a6ee73b",
     "manual pages", _L10N),
    ("manpages-zh", "1.6.4.0-1",
     "81bae29495f6445db290e3f329f1203eb19b651c2a7ea165b74ebdc853a32ac1",
     "manual pages", "GFDL-1.2-or-later, GPL-2.0 and others by page"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Package:
    """A package whose pages are text.

    Attributes:
        what: what it holds, in words.
        form: how its pages are written.
        pages: what the paths of pages look like; `language` and `page` are groups of it.
    """

    name: str
    version: str
    sha256: str
    what: str
    licence: str
    form: Form
    pages: re.Pattern[str]


def _package(name: str, version: str, sha256: str, what: str, licence: str) -> Package:
    form, pattern = _PAGES[what]
    return Package(name, version, sha256, what, licence, form, re.compile(pattern))  # type: ignore[arg-type]


PACKAGES = tuple(_package(*row) for row in _TABLE)


def language_tag(spelt: str | None) -> str:
    """The BCP 47 tag of a language as a path spells it; no language is English."""
    if spelt is None:
        return "en"
    spelt = spelt.partition(".")[0]
    return _TAGS.get(spelt) or re.split("[-_@]", spelt)[0]
