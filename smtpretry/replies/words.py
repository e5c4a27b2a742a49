"""The vocabulary of the table: each name is a class of meaning, one way of putting it a line.

Gaps and repetitions are bounded: linear time.
"""

from __future__ import annotations

from .stage import Stage


def either(*phrases: str) -> str:
    """One of these."""
    return "|".join(phrases)


ANY_4XX, ANY_5XX, REFUSALS = range(400, 500), range(500, 600), range(400, 600)
TRANSACTION = (Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.END_OF_DATA)
FILLING = (Stage.RCPT, Stage.DATA, Stage.END_OF_DATA)

_REQUIRED = r"(?:requi\w{0,2}red|needed|mandatory|necessary|first)\b"
_MUST = r"\b(?:must|need to|have to|please|should|first)\b(?! not)"
_FORBIDDEN = r"(?:denied|not (?:permitted|allowed|authori[sz]ed)|prohibited|refused|is disabled)\b"
_CANNOT = (
    r"\b(?:unable|not (?:permitted|allowed|authori[sz]ed|configured)|can ?not|can't|won't|will not"
    r"|do(?:es)?(?: not|n't)|refus\w+)"
)
TIMEOUT = r"\btime(?:d |-)?out\b"

BAD_CERTIFICATE = either(
    r"certificate[ _]verify[ _]failed",
    r"certificate .{0,40}(?:expired|mismatch|not valid|self.signed)",
)
TLS = either(
    _MUST
    + r".{0,20}\b(?:issue|use|send|start|enable|negotiate|connect|upgrade|be)\b"
    + r".{0,24}\b(?:start ?tls|tls|ssl|encrypt\w*)\b",
    r"\b(?:start ?tls|tls|ssl|encryption|secure connection)\b.{0,30}\b" + _REQUIRED,
    r"\b(?:requires?|only)\b.{0,30}\b(?:tls|ssl|encrypted|secure connection)\b",
    r"(?:\bnot|n't) (?:sent )?(?:over|via) an? (?:tls|ssl|encrypted)\b",
    r"\bdisallowed on (?:non-secure|unencrypted)",
)
BAD_SMTP = either(
    r"\b(?:protocol|syntax) (?:error|violation)",
    r"\bpipelin",
    r"\binvalid base64",
    r"\bbare (?:cr|lf|newline|line.?feed)",
    r"smtplf|barelf",  # the pages that qmail and Haraka name
)
_LIMIT = r"\b(?:limit\w*|quota|max\w*|exceed\w*|too m(?:any|uch))\b"
_THIS_SESSION = r"(?:(?:this|the|an?|one|each|single|same|your|smtp|tcp) ){0,3}(?:session|connection)\b"
SESSION_LIMIT = either(
    _LIMIT + r".{0,24}\b(?:messages?|e?mails?|msgs?|recipients?|rcpts?|transactions?|deliver\w+|quota)\b.{0,12}"
    r"\b(?:per|in|on|for|during|over|of) " + _THIS_SESSION,
    r"\bsession exceeded|\bsession limit",
    r"\b(?:session|connection) (?:message|mail|transaction|recipient)s? (?:limit|count)",
    r"\b(?:a new|a new smtp|another|another new) (?:session|connection)\b|(?<!not )\breconnect",
    r"\btoo many (?:messages|e?mails) sent\W{0,3}$",
)
_MESSAGES = r"(?:(?:concurrent|open|smtp|simultaneous|recent) )?(?:messages|e?mails?|connections?|sessions)\b"
_SOME = r"(?:(?!invalid|unknown|bad|fail|wrong|non)\w{1,20} )"
TOO_MANY_RECIPIENTS = either(
    rf"\btoo m(?:any|uch) {_SOME}{{0,2}}(?:recipients|rcpts?|addressees)\b",
    rf"\b(?:max\w*|more than|exceed\w*|number of) {_SOME}{{0,5}}(?:recipients|rcpts)\b",
    rf"\blimit\w* {_SOME}{{0,2}}\d+ recipients\b",
    r"\brecipients? (?:limit|count)\b",
    r"\brecipients\b(?! (?:is |are )?not).{0,20}\b(?:exceed\w*|reached|limit|allowed)\b",
    r"\bseparate transaction|\bmultiple (?:\w{1,20} )?domains\b",
    r"\b(?:one|single) (?:recipient|rcpt|domain)\b.{0,20}\b(?:at a time|per|only)\b",
)
BAD_RECIPIENTS = r"\b(?:invalid|unknown|bad|wrong|failed|non-?existent) (?:recipients|users|rcpts)\b"
WINDOW = either(  # what says that a limit is one of time, and not of this session or transaction
    r"\b(?:hours?|hourly|daily|days?|minutes?|seconds?|weekly|monthly|today|24 ?h\w*|from|received|sent|recent\w*)\b",
    r"\b(?:throttl\w+|frequen\w+|quota|rate|too (?:fast|quickly|often))\b",
    r"\d ?/ ?\d{0,4} ?[smhd]\b",
)
_WITHIN = r".{0,80}\b(?:this|per|an?|each|every|one|last|past) ?"
QUOTA = either(
    r"\b(?:hour|hourly|daily|day)\b.{0,24}\b(?:limit|quota)\b|\bfor the day\b",
    r"\b(?:sending|submission|throttling|count) ?(?:limit|quota) ?(?:exceed|reached)",
    r"\b(?:exceed|reach)(?:s|ed|ing)?\b.{0,30}\b(?:sending|submission) (?:limit|quota)",
    _LIMIT + _WITHIN + r"(?:hour|day|24 ?h\w*)\b|" + _LIMIT + r".{0,40}\btoday\b",
)
RATE = either(
    r"\b(?:rate|frequency)[- ]?(?:is |was )?(?:limit|overlimit|exceed)|\bsending rate\b|\bat a rate that|\bthrottl",
    _LIMIT + _WITHIN + r"(?:minute|second)\b",
    r"\btoo m(?:any|uch) (?:new )?(?!spam|unwanted|junk)(?:\w{1,20} )?"
    r"(?:recipients|mail|messages|connections|commands|sessions|requests) from\b",
    r"\btoo (?:fast|quickly|often|frequent)|\bslow down\b",
    rf"\btoo m(?:any|uch) {_MESSAGES}(?! (?:containing|with))",
)
MAILBOX = r"\b(?:mail ?box|inbox|over ?quota|storage)\b"
FOR_NOW = either(
    r"\btempor(?:ar|är)\w*\b(?! e?-?mail| address| domain)|\btransient\b|\bdeferred\b",
    r"\b(?:try|retry|resend|send|come|again|attempt\w*)\b.{0,24}\blater\b|\blater\b.{0,8}\btry",
    r"\b(?:try|retry) (?:again )?(?:in|after|soon|shortly)\b",
    r"\bplus tard\b|\bm[aá]s tarde\b|\bsp[aä]ter\b",
)
GREYLIST = r"\bgr[ea]y[- ]?list"
SENDER_AUTH = either(
    r"\b(?:spf|dkim|dmarc)\b",
    r"\b(?:sender|e-?mail|message|mail) is (?:un|not )authenticated|\bunauthenticated (?:e-?mail|message)",
    r"\bauthentication (?:checks|information|level|results)\b",
    r"\bname lookup failed",
)
LOG_IN = either(
    r"\bauth\w{0,14} (?:is |was |command )?" + _REQUIRED,
    r"\brequires? (?:\w{1,20} )?(?:auth\w*|log-?in)\b",
    _MUST + r".{0,12}\b(?:log ?in|log on|authenticate|be authenticated|(?:issue|send|use|do) (?:an )?auth)\b",
    _MUST + r".{0,12}\b(?:enable|turn on|use) (?:smtp )?auth",
    r"\bnot logged[- ]in\b|\blog ?in first\b|\bunauthenticated senders?\b.{0,8}\bnot allowed",
    r"(?:^|\b(?:you are|client|client is|client was|user|connection|session|sender) )not (?:yet )?authenticated",
)
RELAY = either(
    r"\brelay(?:ing)?(?: \S{1,60}){0,3} " + _FORBIDDEN,
    _CANNOT + r"(?: to)? relay\b",
    r"\bno relay|\bnot a relay\b",
    r"\bcannot deliver mail for\b",  # Haraka, for whom it does not relay
    r"\bclient host rejected: access denied",  # Postfix, where a submission service checks the client first
)
NO_NAME = either(
    r"\bcannot find your (?:reverse )?host|\bname lookup failed",
    r"\bunverif[iy]+able (?:sending|host|ip)",
    r"\bhelo command rejected",
    r"\b(?:no|missing|invalid|without|bad)(?: valid)? (?:reverse.?dns|rdns|ptr|reverse host)",
    r"\b(?:reverse.?dns|rdns|ptr)\b.{0,30}\b(?:missing|required|not (?:found|exist|set|match)|mismatch)",
)
NO_SUCH_USER = either(
    r"\b(?:user|mailbox|recipient|account|address) (?:\w{1,20} )?"
    r"(?:unknown|not found|not known|does(?: not|n't) exist)\b",
    r"\b(?:no such|unknown|invalid|non-?existent) (?:local )?(?:user|mailbox|recipient|account|address)\b",
)
UNSURE = either(
    r"verif|check|look ?up|unable|could ?n[o']t|(?:temporary|internal|server) error|" + TIMEOUT,
    r"try|retry|wait|too many|rate|quota|full|limit",
)
MAILBOX_FULL = either(
    r"\b(?:mail ?box|inbox|account|user|recipient|maildir)\b.{0,30}\b(?:full|quota|storage)\b",
    r"\bover ?quota|\bquota (?:exceeded|full)",
    r"\bexceeded storage allocation",
)
TOO_BIG = either(
    r"\btoo (?:big|large)\b|\bmessage size\b|\bsize limit\b|\btoo much (?:mail )?data\b",
    r"\bexceed\w*\b.{0,30}\b(?:size|length)\b",
)
CROWD = either(
    r"\b(?:concurrent|simultaneous|many|maximum|number of)\b.{0,30}\b(?:connections?|sessions?)\b|\btrop de connexions",
    r"\bsender thread limit",
)
PER_TIME = r"\brate\b|\b(?:hour|day|minute|second)s?\b"
BUSY = either(
    r"\bshut(?:ting)? ?down|\b(?:high|system|server) load\b|\boverload|\bserver (?:is )?(?:too )?busy\b",
)
STORAGE = either(
    r"\b(?:insufficient|out of|not enough|unable to allocate)\b.{0,24}\b(?:disk|storage|space|memory|resources|buffer)",
    r"\bdisk\b.{0,12}\bfull|\bspace shortage|\b(?:mail )?system full",
)
OUT_OF_SERVICE = r"\b(?:service|server|system)\b.{0,24}\b(?:unavailable|not (?:available|accepting)|refused)"
BLOCKED = either(
    r"\bblock(?:ed|list)|\bblack-?list|\b(?:rbl|dnsbl)\b|\blisted\b|\bbanned\b",
    r"spamhaus|spamcop|\breputation\b|\bpolicy restrictions",
)
TOKEN = either(
    r"\btoken\b.{0,30}\b(?:expired|invalid|revoked|not valid|rejected|refused)\b",
    r"\b(?:expired|invalid|revoked|bad|stale) (?:\w{1,20} ){0,2}token\b",
)
