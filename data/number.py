r"""One number in a text, as models and people write it: read whole, or not at all.

    1,250.50  1 250,50  1.250,50  1'250  1_250  1,00,000  1,25  .5  1.5e3  1.5 × 10^3  10³
    3/4  \frac{3}{4}  3 1/2  3½  18 and a half  1.2 million  2k  $18  18 €  -$5  50%  (18)  **18**

A comma before three digits separates thousands; before one or two digits it is decimal. A point
alone is decimal. `50%` is 50: units do not count. Not understood are numbers in words (eighteen),
sums that nobody worked out (2 + 3), ranges, lists, times, dates, and what has more than LONGEST
characters.
"""

import re
import unicodedata
from fractions import Fraction


LONGEST = 120

# Spellings that mean the same become one: (pattern, its replacement), applied in this order.
FRACTION = r"[\u00bc-\u00be\u2150-\u215e]|\\[dtc]?frac"
SAME = [(re.compile(pattern), same) for pattern, same in (
    (r"[\u2212\u2013\uff0d]", "-"), ("[\u2019\uff07]", "'"), ("[\uff0c\u066c]", ","),
    ("[\uff0e\u066b]", "."), ("\uff04", "$"), (r"[\u00d7\u00b7\u22c5]|\\(?:times|cdot)\b", "*"),
    (r"\u2248|\\approx\b", "="), (r"\^\s*\{?\\circ\b|[~\u00b0]", " "),
    (rf"(?<=\d)\s*(?={FRACTION})", " "),                                        # 3½ is 3 ½
    (r"\\[dtc]?frac\s*(\d)\s*(\d)|\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1\3/\2\4"),
    (r"[\u00bc-\u00be\u2150-\u215e]|(?<=\d)[\u00b2\u00b3\u00b9\u2070-\u2079\u207b]+",
     lambda m: ("" if "\u2044" in unicodedata.normalize("NFKC", m[0]) else "^")
     + unicodedata.normalize("NFKC", m[0]).replace("\u2212", "-")),
    ("[\u2044\u2215\uff0f]", "/"), (r"\{,\}", ","), (r"\\!", ""), (r"\\([$%#_&])", r"\1"),
    (r"\\(?:text|math)[a-z]*\b|\\(?:boxed|left|right|bf|rm|q?quad)\b|\\[,;: ()\[\]]", " "),
    (r"[{}]|[^\S\n]", " "))]

MONEY = r"(?:(?:US|R)?[$\u20ac\u00a3\u00a5\u20b9]|(?:USD|EUR|GBP|Rs\.?)\s)"
START = re.compile(rf"([-+]?){MONEY}?\s?([-+]?)(?=\.?\d)")
DIGITS = re.compile(r"\.?\d(?:[\d.,'_ ]*\d)?")                  # and what may separate them
POINT = re.compile(r"""(?:\d+
    | [1-9]\d{0,2}(?:,\d{3})+ | [1-9]\d?(?:,\d\d)+,\d{3}                    # 1,250  1,00,000
    | [1-9]\d{0,2}([ '_])\d{3}(?:\1\d{3})* )?(?:\.\d+)?                     # 1 250  1'250
    """, re.VERBOSE)
COMMA = re.compile(r"""(?: [1-9]\d{0,2}(?:\.\d{3})+ | [1-9]\d{0,2}([ '])\d{3}(?:\1\d{3})* ),\d+
    | [1-9]\d{0,2}(?:\.\d{3}){2,} | \d+,\d\d? | 0,\d+                       # 1.250.000  1,25
    """, re.VERBOSE)
MIXED = re.compile(r"(\d+)(?: and | )(\d\d?)\s?/\s?(\d\d?)(?![.,'_/]?\d)")
BELOW = re.compile(rf"\s?/\s?(\d{{1,{LONGEST}}})(?![.,'_]?\d)")
POWER = re.compile(r"[eE]([-+]?\d{1,3})(?!\d)"
                   r"|\s?[*x]\s?10\s?(?:\^|\*\*)\s*([-+]?\d{1,3})(?!\d)")
TEN = re.compile(r"10(?:\^|\*\*)\s*([-+]?\d{1,3})(?!\d)")
LARGE = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
         "trillion": 10**12, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "bn": 10**9}
TIMES = re.compile(r"[ -]{0,5}((?i:hundred|thousand|million|billion|trillion))\b|(bn|[kKMB])\b")
HALF = re.compile(r" and (?:a|one) half\b")

# What ends a statement: a sentence's end, a reason, a remark after a unit.
END = re.compile(r"""[.!?](?=\s|$) | ;(?=\s*[^\W\d]) | \n | \s\((?!\s*(?:or|and|to|in)\b)
    | ,?\s+(?:since|because|which|where|so)\b
    | (?<=[a-z])\s+(?:in|for|at|on|from|within|during|after|every|each)\b""", re.VERBOSE)
# A unit may stand right behind the digits. Then anything may follow but OTHER, which makes it
# another number (18 thousand, 18 or 20, 18 + x). One letter may be a factor: 18x is no number, 18 g
# is one.
UNIT = re.compile(r"(?![^\W_])|(?:[A-Za-z]{2,}|[gGhHsSlLCFWV])(?!\w)")
OTHER = re.compile(r"""\d | [+^\\\u221a\u03c0\u5341\u767e\u5343\u4e07\u842c\u5104\u4ebf]
    | ^\s*[*:<>=\u00f7]\s*\w | (?<![^\W_]) (?:
      or|minus|plus|times|multiplied|divided|squared|cubed|remainder|[xyzn]|(?-i:[kKMBT])
    | half|halves|(?:third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth)s
    | dozens?|score|gross|lakhs?|crores?|hundreds?|thousands?|millions?|billions?|trillions?
    | one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve
    | (?:thir|four|fif|six|seven|eigh|nine)teen | (?:twen|thir|for|fif|six|seven|eigh|nine)ty
    ) (?![^\W_])""", re.IGNORECASE | re.VERBOSE)


def plain(text):
    """`text` with digits of other scripts, LaTeX and typographic signs in plain spelling."""
    text = "\n".join("".join(str(unicodedata.decimal(c, c)) for c in text).splitlines())
    for pattern, same in SAME:
        text = pattern.sub(same, text)
    return text


def leading(text):
    """(value, what follows it) of the number that plain `text` begins with. None: it begins with no
    number. (None, ""): it begins with one that is not understood."""
    start = START.match(text)
    if not start:
        return None
    run = DIGITS.match(text, start.end())
    mixed, ten = MIXED.match(text, run.start()), TEN.match(text, run.start())
    point, comma = POINT.fullmatch(run[0]), COMMA.fullmatch(run[0])
    if (start[1] and start[2]) or not (mixed or ten or point or comma) or len(run[0]) > LONGEST:
        return None, ""
    if mixed:
        whole, above, below = (int(part) for part in mixed.groups())
        if not 0 < above < below:
            return None, ""
        value, end = whole + Fraction(above, below), mixed.end()
    elif ten:
        value, end = Fraction(10) ** int(ten[1]), ten.end()
    else:
        digits = run[0] if point else run[0].replace(".", "").replace(",", ".")
        value, end = Fraction(re.sub("[,'_ ]", "", digits)), run.end()
        if found := BELOW.match(text, end):
            if int(found[1]) == 0:
                return None, ""
            value, end = value / int(found[1]), found.end()
        elif found := POWER.match(text, end):
            value, end = value * Fraction(10) ** int(found[1] or found[2]), found.end()
        while found := TIMES.match(text, end):
            value, end = value * LARGE[found[2] or found[1].lower()], found.end()
        if found := HALF.match(text, end):
            value, end = value + Fraction(1, 2), found.end()
    return (-value if "-" in start[0] else value), text[end:]


def written(value):
    """The text of a Fraction ("18", "-5", "3/4"); None if it is too long, or the value is None."""
    short = value is not None and max(abs(value.numerator), value.denominator) < 10**LONGEST
    return str(value) if short else None


def stated(text):
    """(is there one, its text or None) of the number that plain `text` states first. Of an equation
    it is the right side."""
    left, equals, right = (text[:END.search(text + "\n").start()]).rpartition("=")
    if equals and re.search(r"[<>!]$|,\s|\b(?:and|or)\b", left):
        return True, None                                       # x >= 18; x = 3 and y = 5
    found = leading(right.lstrip(" *_`$(|\"'"))
    if not found:
        return bool(equals), None
    value, rest = found
    rest = re.sub(r"(?<=[A-Za-z])\^ ?-?\d(?!\d)", "", rest)     # 18 cm^2
    fine = UNIT.match(rest) and not OTHER.search(rest)
    return True, written(value) if fine else None
