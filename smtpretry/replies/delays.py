"""The delay that a text names: "Greylisted for 300 seconds", "come back in 00:05:00"; and delays, for people."""

from __future__ import annotations

from .patterns import caseless, compiled

# A duration alone is no delay ("unable to deliver in 840 minutes"): a phrase around it must say so. Each phrase below
# is one way of saying so. All repetitions are bounded: the time is linear in the text.

_LONGEST = 5 * 86400.0  # seconds
_NAME = "@"  # stands for a word that is no language: an address, a link, a time stamp, an id
_OPAQUE = r"[@\\]|://|\d\.\d+\.\d|\d-\d+-\d|:\w*:\w*:"
_CLOCK = r"\d{1,3}:[0-5]\d:[0-5]\d"
_NUMBERS = {
    word: number
    for words, number in (
        ("a an one eine einer einem une un una uno um uma", 1.0),
        ("two zwei deux dos due", 2.0),
        ("three drei trois tres tre", 3.0),
        ("four", 4.0),
        ("five fünf cinq cinco cinque", 5.0),
        ("six", 6.0),
        ("eight", 8.0),
        ("ten zehn dix diez dieci dez", 10.0),
        ("twelve", 12.0),
        ("fifteen", 15.0),
        ("twenty", 20.0),
        ("thirty", 30.0),
        ("forty-five", 45.0),
        ("sixty", 60.0),
    )
    for word in words.split()
}
_UNITS = {
    0.001: r"ms|msecs?|milliseconds?",
    1.0: r"s|secs?|seconds?|sekunden?|secondes?|segundos?|secondi|seconden|секунд\w?",
    60.0: r"m|mins?|minutes?|minuten?|minutos?|minuti|минут\w?",
    3600.0: r"h|hrs?|hours?|stunden?|heures?|horas?|or[ae]|uur|час\w{0,2}",
    86400.0: r"d|days?|tage?n?|jours?|d[ií]as?|giorn[io]|dag(?:en)?|дн\w{1,2}|день",
    604800.0: r"w|weeks?",
}
_FIGURES = r"\d{1,7}(?:[.,]\d{1,3})?"
_WORDS = rf"\b(?:half\s+an?|{'|'.join(sorted(_NUMBERS, key=len, reverse=True))})"
# "5 minutes", "30s", "an hour", but not "as": a unit of one letter stands behind figures alone.
_MORE = r"(?:more\s|further\s|additional\s)?"
_PIECE = rf"(?:{_FIGURES}[\s-]{{0,2}}|{_WORDS}[\s-](?!\w\b)){_MORE}(?:{'|'.join(_UNITS.values())})(?:\(s\))?(?![^\W\d])"
_DURATION = (
    rf"((?>(?<!after ){_CLOCK}(?!\s?(?:[ap]m|utc|gmt|[-+]\d)\b)"
    rf"|\d{{1,2}}:\d\d(?=\s?(?:min|hour))"
    rf"|(?:\d{{1,6}}\s?(?:-|\u2013|to|or|bis)\s?)?{_PIECE}(?:\s?(?:,|&|and|und|et|y|e|и)?\s?{_PIECE}){{0,3}}))"
    rf"(?!\s?(?:ago|old|period|window|interval)\b)"
)
# Words between a cue and a duration: none of a number, a new sentence, or something that happened before.
_GAP = r"(?:(?!exceed|time(?:d |-)?out|unable|fail|gave|sent|receiv|last|past|per\b)[^\d;!?.]|\.(?=\S)){0,60}?"
_WORDS_BETWEEN = r"(?:\s+[^\W\d]+){0,4}?\s+"
_ABOUT = (
    r"[^\w-]{0,3}(?:(?:about|approx(?:imately|\.)?|around|roughly|~|another|an?\s+additional|a\s+further|at\s+least"
    r"|minimum|a\s+minimum\s+of|the\s+(?:next|following|first)|next|up\s+to|no\s+(?:less|sooner)\s+than|etwa|ca\.?|environ)"
    r"\s*){0,2}"
)
_AGAIN = (
    r"(?:re-?try(?:ing)?|re-?tried|try(?:ing)?|again|re-?sen[dt](?:ing)?|resubmit\w*|re-?attempt\w*|back|return|re-?connect"
    r"|re-?deliver\w*|re-?queued?|next\s(?:attempt|delivery|connection|message)|r[ée]essa\w+|erneut|versuch\w*|nuevo"
    r"|int[eé]nt\w+|novamente|tent[ea]|opnieuw|riprova\w*)"
)
_HELD = (
    r"(?:(?:block|bann?|lock|suspend|throttl|limit|deferr?|delay|reject|paus|black-?list|disabl|quarantin|restrict"
    r"|penali[sz])ed|den(?:y|ied)|(?:auto-?)?(?:block|ban)|(?:block|black|deny)-?list)"
)
_WAIT = (
    r"(?:(?:wait|delay|defer|pause|hold(?:\soff)?|sleep|back-?\s?off|cool-?\s?down|slow\sdown|retry|penalty|lockout|ban"
    r"|gr[ea]y-?list\w*|waiting)(?:\s(?:time|period|interval|duration|delay))?(?:\s(?:is|of|for))?)"
)
_OVER = (
    r"(?:expires?|resets?|renews?|ends|lifted|un(?:block|ban|lock)\w*|resumes?"
    r"|(?<!not\s)(?:allowed|accepted|possible)(?=\safter)|will\sbe\s(?!delet|bounc|return|reject|remov|discard)\w+)"
)
_BEFORE = (
    r"(?:remain(?:ing|s)?|left|missing|to\s(?:go|wait)|delay|until\s(?:re\w+|you|next|un\w+)"
    r"|before\s(?:re-?\w+|you|next|trying|sending|another|attempting))"
)
_THEN = rf"(?:,|,?\s)(?:(?:please\s)?{_AGAIN}\b|you\s(?:can|may|will))"
_SHUT_OUT = r"(?:can\s?not|can't|not\s(?:allowed|permitted)\sto)\s(?:connect|send|deliver)"
_IN = r"(?:\b(?:in|after|en|em|nach|over|not\s(?:before|earlier\sthan))\b|(?<=later\s)\()"
_BARE = r"(\d{1,7})(?=\s?(?:$|[.,;:)\]}\"']))"  # a number of seconds without a word for it
_CUES = (  # what says that the duration behind it is a delay
    # try again in 5 minutes; resend after an hour; come back in 00:05:00; try later (300 seconds)
    rf"(?<!many )\b{_AGAIN}\b{_GAP}{_IN}",
    # later in 7 seconds
    r"\blater\s(?:in|after)",
    # dans 10 minutes; через 5 минут
    r"\b(?:dans|через|tra|fra)",
    # greylisted for 300 seconds; you are being graylisted and will pass in 5 min
    rf"\bgr[ea]y-?\s?list\w*{_GAP}\b(?:for|in|after|of|is|für|pour|por)",
    # blocked for 10 minutes; temporarily rejected for the next hour; you cannot connect for 2 hours
    rf"\b(?:{_HELD}|{_SHUT_OUT}){_WORDS_BETWEEN}(?:for|during)\b",
    # please wait 60 seconds; wait for another 5 minutes; delay: 30s; greylisting (5 min); retry interval is 5 min
    rf"\b{_WAIT}",
    # limit expires in 45 seconds; quota resets in 3 hours; will be accepted after 5 min
    rf"\b{_OVER}{_WORDS_BETWEEN}(?:in|after)\b",
)
_PHRASES = (
    rf"(?:{'|'.join(_CUES)}){_ABOUT}{_DURATION}",
    # retry 5 minutes later
    rf"\b{_AGAIN}\W{{1,3}}{_DURATION}\s+(?:later|from\s+now)\b",
    # in 5 minutes try again; after 300 seconds, please retry; after 24 hours you can send again
    rf"(?:^|[.;:!,(]\s?|please\s|bitte\s)(?:in|after|nach|en)\s{_ABOUT}{_DURATION}{_THEN}",
    # 45 seconds remaining; 300 s before retrying; 5 minutes until you can send again
    rf"\b{_DURATION}\s{_BEFORE}\b",
    # remaining: 45 s; time left 2m30s
    rf"\b(?:remaining|time\sleft)(?:\s(?:time|delay|wait))?(?:\sis)?\W{{1,3}}{_DURATION}",
    # retry-after: 300; retry in: 300; seconds left: 45
    rf"\bretry(?:[-_]?(?:after|in)[^\w-]{{1,4}}|\s(?:after|in)\s?[:=]\s?){_BARE}",
    rf"\b(?:seconds|secs)\s(?:remaining|left|to\swait)\s?[:=]\s?{_BARE}",
)
_DELAY = "|".join(_PHRASES)
_PIECES = (
    rf"(?:({_FIGURES})[\s-]{{0,2}}|({_WORDS})[\s-](?!\w\b)){_MORE}"
    rf"(?:{'|'.join(f'({unit})' for unit in _UNITS.values())})(?:\(s\))?(?![^\W\d])"
)


def _seconds(duration: str) -> float:
    """The seconds of a duration: "00:05:00", "1 hour 2 minutes", "5-10 min" (the longer), "300"."""
    if ":" in duration:
        hours, minutes, *rest = map(int, duration.split(":"))
        return hours * 3600.0 + minutes * 60.0 + rest[0] if rest else hours * 60.0 + minutes
    if duration.isdecimal():
        return float(duration)
    total = 0.0
    for figures, word, *units in caseless(_PIECES).findall(duration):
        total += _number(figures or word) * next(size for size, unit in zip(_UNITS, units, strict=True) if unit)
    return total


def _number(word: str) -> float:
    if word[0].isdecimal():
        whole, _, part = word.partition(",")
        return float(whole + part if len(part) == 3 else word.replace(",", "."))  # noqa: PLR2004 - "1,800" against "1,5"
    return 0.5 if word[:4].lower() == "half" else _NUMBERS[word.lower()]


def delay_in(text: str) -> float | None:
    """The seconds to wait that the text asks for, or None."""
    words = [_NAME if compiled(_OPAQUE).search(word) else word for word in text.split()]
    if (found := caseless(_DELAY).search(" ".join(words))) is None:
        return None
    seconds = _seconds(next(group for group in found.groups() if group is not None))
    return seconds if 0 < seconds <= _LONGEST else None


def duration(seconds: float) -> str:
    """Seconds as a person says them: "3 s", "15 min", "2 min 30 s", "1 day"."""
    if seconds < 1:
        return f"{round(seconds, 1):g} s"
    parts, left = [], round(seconds)
    for size, unit in ((86400, "day"), (3600, "h"), (60, "min"), (1, "s")):
        number, left = divmod(left, size)
        if number:
            parts.append(f"{number} {unit}" + "s" * (unit == "day" and number > 1))
    return " ".join(parts[:2])
