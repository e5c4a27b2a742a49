"""The vocabulary of the table: each name is a class of meaning, one way of putting it a line.

Gaps and repetitions are bounded: linear time.
"""

from __future__ import annotations

from .rule import Words
from .stage import Stage


def either(*phrases: str) -> Words:
    """One of these."""
    return Words("|".join(phrases))


ANY_4XX, ANY_5XX, REFUSALS = range(400, 500), range(500, 600), range(400, 600)
TRANSACTION = (Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.END_OF_DATA)
FILLING = (Stage.RCPT, Stage.DATA, Stage.END_OF_DATA)

# --- Log in, encrypt --------------------------------------------------------------------------------------------------

_REQUIRED = r"(?:requi\w{0,2}red|needed|mandatory|necessary|first)\b"
_MUST = r"\b(?:must|need to|have to|please|should|first)\b(?! not)"
_FORBIDDEN = r"(?:denied|not (?:permitted|allowed|authori[sz]ed)|prohibited|refused|reject\w*|forbidden|is disabled)\b"
_CANNOT = (
    r"\b(?:unable|not (?:permitted|allowed|authori[sz]ed|configured)|can ?not|can't|won't|will not"
    r"|do(?:es)?(?: not|n't)|refus\w+|den(?:y|ies))"
)
TIMEOUT = either(r"\btime(?:d |-)?out\b")
IDLE = either(r"\btime(?:d |-)?out\b.{0,24}\b(?:from (?:the )?client|client input|closing)\b")
OUT_OF_STEP = either(
    r"\b(?:ehlo|helo|hello)\b.{0,20}\bfirst\b|\bfirst\b.{0,20}\b(?:ehlo|helo|hello)\b",
    r"\bnested mail\b|\bsender (?:is |was )?already (?:specified|given|set)\b|\balready in a (?:mail )?transaction\b",
)
CUT_OFF = either(  # what went wrong between the server and the next one, in its own program's words
    r"\bdial (?:tcp|udp)\b|\bi/o timeout\b|\bcontext deadline exceeded\b",
    r"\bE(?:CONNREFUSED|CONNRESET|CONNABORTED|TIMEDOUT|HOSTUNREACH|NETUNREACH|AI_AGAIN|PIPE)\b",
    r"\b(?:transaction|backend|internal) time(?:d |-)?out\b",
)

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
    r"(?:\bnot|n't) (?:sent )?(?:over|via) an? (?:tls|ssl|encrypted)\b|\b(?:tls|ssl) only\b",
    r"\bdisallowed on (?:non-secure|unencrypted)|\bunencrypted (?:\w{1,20} ){0,2}not allowed",
    r"\bencrypted connection (?:is )?" + _REQUIRED,
    r"\b(?:verschl[üu]ssel|chiffr|cifrad|crittograf)\w+\b.{0,20}\b(?:erforderlich|requise?|requerid\w+|richiest\w+)",
)
LOG_IN = either(
    r"\bauth\w{0,14} (?:is |was |command )?" + _REQUIRED,
    r"\b(?:requires?|needs?) (?:\w{1,20} ){0,2}(?:auth\w*|log-?in)\b",
    _MUST
    + r".{0,12}\b(?:log ?in|log on|sign in|authenticate|be (?:authenticated|logged[- ]in)"
    + r"|(?:issue|send|use|do) (?:an )?auth)\b",
    _MUST + r".{0,12}\b(?:enable|turn on|use|turn) (?:smtp )?auth",
    r"\bnot logged[- ]in\b|\blog ?in first\b|^log ?in\b|\bonly logged[- ]in\b|\blog-?in (?:is )?" + _REQUIRED,
    r"\bunauthenticated (?:senders?|clients?|users?)\b.{0,8}\bnot\b",
    r"(?:^|\b(?:you are|client|client is|client was|user|connection|session|sender) )not (?:yet )?authenticated",
    r"\bonly authenticated (?:users|clients|senders)|\b(?:allowed|accepted) (?:only )?(?:for|from) authenticated\b",
    r"\banonymous (?:\w{1,20} ){0,2}not allowed",
    r"\bauthenti\w+ (?:ist |est )?(?:erforderlich|notwendig|n[ée]cessaire|requise|obligatoire)",
    r"\bautenti\w+ (?:(?:es|é|è) )?(?:requerida|necesaria|obrigat\w+|necess[áa]ri[ao]|richiesta)",
    r"\bse requiere autenticaci[oó]n|требуется (?:smtp.)?(?:авториз|аутентиф)|需要.{0,8}(?:认证|身份验证)|認証が必要",
)
LOGGED_IN = either(  # this session, not the account somewhere else
    r"(?<!user )(?<!user is )(?<!account )(?<!account is )\balready (?:been )?(?:authenticated|logged[- ]in)\b"
    r"(?! (?:from|elsewhere|too|(?:on|in|at) another)\b)"
)
RELAY = either(
    r"\brelay(?:ing)?(?: \S{1,60}){0,3} " + _FORBIDDEN,
    _CANNOT + r"(?: to)? (?:\w{1,20} )?relay\b",
    r"\bno relay|\bnot an? (?:open )?relay\b|\bunauthori[sz]ed relay",
    r"\bcannot deliver mail for\b",  # Haraka, for whom it does not relay
    r"\b(?:list of allowed|in my) rcpthosts\b",  # qmail
    r"\blocal users? only\b",  # NetEase
)
TOKEN = either(
    r"\btoken\b.{0,30}\b(?:expired|invalid|revoked|not valid|rejected|refused)\b",
    r"\b(?:expired|invalid|revoked|bad|stale) (?:\w{1,20} ){0,2}token\b",
)
WRONG_PASSWORD = either(  # be it one guess of several
    r"\bpasswords? (?:is |was )?(?:incorrect|wrong|invalid|not correct)\b",
    r"\b(?:incorrect|wrong|invalid|bad) (?:\w{1,20} ){0,3}password\b(?! attempts)",
)
TOO_MANY_LOG_INS = either(r"\btoo m(?:any|uch) (?:\w{1,20} ){0,2}(?:log-?ins?|auth\w*|password)\b")

# --- How SMTP is spoken -----------------------------------------------------------------------------------------------

BARE_LF = either(
    r"\bbare <?(?:cr|lf|newline|line.?feed)|\b(?:cr|lf|newline|line.?feed) not preceded",
    r"smtplf|barelf",  # the pages that qmail and Haraka name
)
BAD_CLIENT = either(r"(?<!syntax or )\bprotocol (?:error|violation)", r"\bpipelin")
BAD_SMTP = either(BARE_LF, r"\b(?:syntax|protocol) (?:error|violation)", r"\binvalid base64")
TOO_BIG = either(
    r"\btoo (?:big|large)\b|\bmessage (?:size|length)\b|\bsize limit\b|\btoo much (?:mail )?data\b",
    r"\bexceed\w*\b.{0,30}\b(?:size|length)\b",
    r"\bmore than \d{5,12} (?:bytes|octets)\b",
)
LONG_LINE = either(r"\blines? (?:is |are |was )?too long\b|\b(?:long|maximum) line length\b|\btoo long lines?\b")

# --- Limits -----------------------------------------------------------------------------------------------------------

_LIMIT = r"\b(?:limit\w*|quota|cap|max\w*|exceed\w*|too m(?:any|uch)|more than|sent \d+ of \d+|only \d+)\b"
_THIS_SESSION = r"(?:(?:this|the|an?|one|each|single|same|your|smtp|tcp) ){0,3}(?:session|connection)\b"
SESSION_LIMIT = either(
    _LIMIT + r".{0,24}\b(?:messages?|e?mails?|msgs?|recipients?|rcpts?|transactions?|deliver\w+|quota)\b.{0,12}"
    r"\b(?:per|in|on|for|during|over|of) " + _THIS_SESSION,
    r"\b(?:messages?|e?mails?|msgs?|transactions?|deliver\w+) (?:per|in|on|for|during|over) "
    + _THIS_SESSION
    + r".{0,12}\b(?:limit|max\w*|exceed\w*|reach\w*)\b",
    r"\btoo many non-?mail commands\b",
    r"\bsession exceeded|\bsession limit|\b(?:limit|quota) (?:is )?(?:reached|exceeded) (?:for|on|in) " + _THIS_SESSION,
    r"\b(?:session|connection) (?:message|mail|transaction|recipient)s? (?:limit|count)",
    r"\b(?:a new|a new smtp|another|another new) (?:session|connection)\b|(?<!not )\breconnect",
    r"\bMI:DMC\b",  # NetEase
)
_MESSAGES = (
    r"(?:(?:concurrent|open|smtp|simultaneous|recent|outgoing|outbound) )?(?:messages|e?mails?|connections?|sessions)\b"
)
_SOME = r"(?:(?!invalid|unknown|bad|fail|wrong|non)\w{1,20} )"
TOO_MANY_RECIPIENTS = either(
    rf"\btoo m(?:any|uch) {_SOME}{{0,2}}(?:recipients|rcpts?|addressees|receivers|destinations)\b",
    r"\btoo much recipient\b",
    rf"\b(?:max\w*|more than|exceed\w*|number of|up to) {_SOME}{{0,5}}(?:recipients|rcpts|receivers)\b",
    rf"\blimit\w* {_SOME}{{0,2}}\d+ (?:recipients|rcpts)\b",
    r"\b(?:recipients?|rcpts?) (?:per \w{1,20} )?(?:limit|count)\b",
    r"\brecipients\b(?! (?:is |are )?not).{0,20}\b(?:exceed\w*|reached|limit|allowed)\b",
    r"\bseparate transaction|\bmultiple (?:\w{1,20} )?domains\b",
    r"\b(?:one|single) (?:recipient|rcpt|domain)\b.{0,20}\b(?:at a time|per|only)\b",
    r"\b(?:only|just) (?:one|1|a single) (?:recipient|rcpt|domain)\b",
    r"\bzu ?viele empf|\btrop de destinataires|\b(?:demasiados|muitos) destinat[aá]rios|\btroppi destinatari",
    r"收件人.{0,6}(?:过多|超)",
)
BAD_RECIPIENTS = either(r"\b(?:invalid|unknown|bad|wrong|failed|non-?existent) (?:recipients|users|rcpts)\b")
ANOTHER_MATTER = either(  # words that show that a status is about something else than the number of recipients
    r"\b(?:rcpthosts|relay\w*|domains?|senders?|users?|mailbox|hosts?|client|ip|spam|virus|block\w*|sizes?|messages"
    r"|e?mails|syntax|helo|ehlo|auth\w*|unknown|invalid|denied|password|length|content)\b"
)
WINDOW = either(  # what says that a limit is one of time, and not of this session or transaction
    r"\b(?:hours?|hourly|daily|days?|minutes?|seconds?|weekly|monthly|today|24 ?h\w*|from|received|recent\w*)\b",
    r"\bsent\b(?!\W{0,3}$)",
    r"\b(?:throttl\w+|frequen\w+|quota|rate|too (?:fast|quickly|often))\b|\bslow",
    r"\d ?/ ?\d{0,4} ?[smhd]\b",
)
_WITHIN = (
    r".{0,80}(?:\b(?:this|per|an?|each|every|one|last|past|within|in(?= \d| one\b| an?\b))"
    r"|(?:\d|messages?|mails?|msgs?|recipients?|rcpts?) ?/) ?"
)
_OVER_IT = r".{0,40}\b(?:limit\w*|quota|max\w*|exceed\w*|reached)\b"
_COUNTED = r"\b(?:messages|e?mails?|msgs?|recipients|rcpts|connections)"


def _per(unit: str, adjective: str) -> str:
    """A limit for such a time, in either order: "too many messages per hour", "hourly limit"."""
    return "|".join(
        (
            rf"{_LIMIT}{_WITHIN}{unit}\b",
            rf"{_COUNTED} ?(?:per|/|an?|each|every|in the last|in(?= \d)) ?{unit}\b{_OVER_IT}",
            rf"\b{adjective}\b.{{0,24}}\b(?:limit|quota|max\w*|allowance|cap)\b",
        )
    )


PER_SECOND = either(
    _per(r"(?:1 ?)?(?:sec(?:ond)?s?|s)", r"per[ -]second"), r"\bmaximum send(?:ing)? rate\b"
)  # Amazon SES's
PER_MINUTE = either(_per(r"(?:(?:\d{1,2} ?)?min(?:ute)?s?|[1-9]\d ?s(?:ec(?:ond)?s?)?)", r"per[ -]minute"))
QUOTA = either(
    _per(
        r"(?:\d{1,2} ?)?(?:hours?|hr|h|days?|24 ?h\w*|week|month)", r"(?:hour|hourly|daily|day|24.hour|weekly|monthly)"
    ),
    r"\b(?:relay|sending|submission|outbound|outgoing) quota\b|\bfor the day\b|" + _LIMIT + r".{0,40}\btoday\b",
    r"\b(?:sending|submission|throttling|count|send) ?(?:limit|quota) ?(?:is |was |has been )?(?:exceed|reached)",
    r"\b(?:exceed|reach)(?:s|ed|ing)?\b.{0,30}\b(?:sending|submission) (?:limit|quota)",
    r"\b(?:relay|send|sending|submission) limit\b.{0,24}\b(?:exceed|reach)",
    r"\bsent too many (?:e-?mails|mails|messages)\b.{0,80}\b(?:hours?|days?)\b",
    r"\bMI:STC\b|\bMI:SFQ\b|\bRP:QRC\b",  # NetEase
)
_FLOW = (  # what a client has too much of
    r"(?:send(?:ing|er)?|e?mails?|messages?|traffic|connection|delivery|submission|outgoing|outbound|client|requests?|burst|bulk)"
    r" (?:rate|speed|volume|frequency|traffic|limits?|quota)\b"
)
RATE = either(
    r"\bsendelimit|\blimite? d['e ]\W?envoi|\bl[ií]mite (?:\w{1,20} )?de env[ií]o",
    r"\blimite di invio|лимит\w* .{0,12}отправ",
    r"\b(?:rate|frequency|volume)[- ]?(?:is |was |has been )?(?:limit|overlimit|exceed)",
    r"\bfrequency of\b.{0,40}\blimited",
    r"\b(?:submission|message|mail|connection) rate\b.{0,40}\bexceed",
    r"\bnumber of (?:messages|e?mails) (?:exceed|allowed)",
    r"\bexceed\w*\b.{0,24}\b(?:number|limit) of (?:messages|e?mails)\b",
    r"\bsending rate\b|\brate of (?:sending|mail|messages)\b|\bat a rate that|\bthrottl|\bexceed\w*\b.{0,24}\brates?\b",
    r"\btoo m(?:any|uch) (?:new )?(?!spam|unwanted|junk)(?:\w{1,20} )?"
    r"(?:recipients|receivers|mail|messages|traffic|connections|commands|sessions|requests|transactions)"
    r"(?: received)? from\b",
    r"\bexcessive (?:\w{1,20} )?(?:rate|volume|traffic|connections|messages)\b",
    r"\btoo (?:fast|quickly|often|frequent)|\bslow(?:er)? down\b|\bsend (?:more )?slow(?:er|ly)\b",
    rf"\btoo m(?:any|uch) {_MESSAGES}(?! (?:containing|with))|\btoo many requests\b",
    r"\bexceeded your (?:\w{1,20} )?limits?\b|\blimits? of (?:your|this) (?:plan|account|subscription)\b",
    r"\b(?:exceed|reach)\w* (?:\w{1,20} ){0,2}limits? (?:for|on|of) (?:sending|outgoing|outbound)\b",
    r"\blimit\b.{0,30}\b(?:outgoing|outbound) (?:messages|e?mails?)\b.{0,20}\b(?:exceed|reach)",
    rf"\b{_FLOW}.{{0,30}}\b(?:exceed|reach|hit|too (?:high|fast|great)|over)",
    rf"\b(?:exceed|reach|reduce|lower|decrease)\w*\b.{{0,24}}\b{_FLOW}",
    r"\bmessages? limit (?:reached|exceeded)(?! (?:for|on|in) (?:this|the))",
    r"\b(?:e?mail|message)s? (?:send(?:ing)? )?limit exceeded",
    r"\btrop (?:de (?:messages|courriels|mails)|vite)",
    r"\bzu ?viele (?:nachrichten|e?-?mails|verbindungen)|\bzu schnell\b",
    r"\bdemasiados? (?:mensajes|correos)|\btroppi messaggi|\bmuitas mensagens|\bte veel (?:berichten|e?-?mails)",
    r"\bza du[żz]o wiadomo|频率|頻率|发送过快|送信制限",
    r"\bHL:IFC\b",  # NetEase
)
REPUTATION = either(
    r"\b(?:bounce|spam|complaint) rate\b",
    r"\breputation\b|\bcomplaints?\b|\bunusual (?:rate|volume)|\bunexpected volume|\bunsolicited\b",
)
CROWD = either(
    r"\b(?:concurrent|simultaneous|many|maximum|number of)\b[^;]{0,30}\b(?:connections?|sessions?)\b"
    r"|\btrop de connexions",
    r"\bconnections? (?:limit|count)\b|\bsender thread limit|\bHL:ICC\b|\btoo many (?:connected )?clients\b",
    r"\bzu ?viele (?:gleichzeitige )?verbindungen|\bdemasiadas conexiones|\btroppe connessioni",
)
PER_TIME = either(r"\brate\b|\b(?:hour|day|minute|second|sec|min)s?\b")

# --- The recipient ----------------------------------------------------------------------------------------------------

RECIPIENT_RATE = either(
    r"\breceiving (?:e-?)?(?:mails?|messages) (?:too|at a rate|faster)\b|\breceiving too (?:many|much)\b(?! bounces)",
    r"\b(?:exceed\w*|limit|too m(?:any|uch))\b.{0,80}\b(?:to|for) (?:this|that) (?:recipient|mailbox|user|address)\b",
    r"\brecipient (?:has |is )?(?:exceed|receiv|throttl)\w*(?! (?:\w{1,20} )?(?:quota|storage|space|size|disk))",
    r"\brecipient (?:\w{1,20} ){0,2}(?:rate|thread|message|forwarding|frequency)s? limit",
    r"\b(?:recipient|mail ?box|user)\b.{0,40}\b(?:incoming|inbound|receiv\w+) (?:\w{1,20} )?(?:limit|quota|rate)",
    r"\b(?:limit|quota|rate) (?:of|for|on) (?:incoming|inbound)\b",
    r"\b(?:messages|mail) to \S{1,64}@\S{1,255} (?:\w{1,20} ){0,2}(?:deferred|throttled|limited)\b",
    r"\b(?:mailbox|recipient)\b.{0,30}\btoo (?:many|much) (?:new )?(?:mail|message)s? (?:in|within|per|at)\b",
)
MAILBOX = either(r"\b(?:(?<!your )mail ?box(?! unavailable| \S{1,64}@)|inbox|over ?quota|storage)\b")
HOARD = either(  # too many messages that lie in the mailbox already
    r"\btoo many (?:messages|e?mails) (?:stored )?on the server\b|\bnumber of (?:messages|e?mails) stored\b",
    r"\btoo many (?:messages|e?mails) (?:stored )?in (?:\w{1,5} )?(?:mail ?box|inbox|account)\b",
    r"\b(?:user|mail ?box|inbox|account) (?:\w{1,20} )?(?:has|contains|holds) too many (?:messages|e?mails)"
    r"(?! (?:sent|per|in|today|this))",
    r"\b(?:messages|e?mails) in (?:\w{1,5} )?(?:mail ?box|inbox)\b.{0,30}\b(?:limit|exceed\w*|max\w*)",
    r"\bzu ?viele e?-?mails (?:auf|im)\b",
)
MAILBOX_FULL = either(
    HOARD,
    r"\b(?:mail ?(?:box|file|folder|store|drop)|inbox|account(?:\(s\))?|user|recipient|maildir)\b.{0,40}"
    r"\b(?:full|quota|storage|enough (?:disk )?space)\b",
    r"\b(?:mail ?box|inbox) (?:size |storage )?(?:limit|quota)",
    r"\bexceed\w*\b.{0,20}\b(?:mail ?box|inbox) (?:size|limit)",
    r"\bover ?quota|\bover (?:his|her|its|their|the) (?:\w{1,20} )?quota",
    r"\bquota (?:is )?(?:exceeded|full)|\bfull (?:mail ?box|inbox)",
    r"\bexceeded storage allocation",
    r"\bbo[iî]te\b.{0,30}\bpleine|\b(?:postfach|mailbox)\b.{0,20}\bvoll\b",
    r"\bbuz[oó]n\b.{0,20}\bllen[oa]|\bcasella\b.{0,20}\bpiena",
    r"\bcaixa\b.{0,20}\bcheia|переполнен|邮箱.{0,4}(?:已满|满)|信箱.{0,4}(?:已滿|滿)",
)
_WHO = r"(?:user|mail-? ?box|recipient|account|address(?:ee)?|e-?mail address|inbox)"
_CLOSED = r"(?:inactive|disabled|discontinued|closed|deactivated|suspended)"
NO_SUCH_USER = either(
    rf"\b{_WHO} (?:\w{{1,20}} )?(?:unknown|not found|not known|does(?: not|n't) exist|not exist\w*)\b",
    r"\be-?mail (?:does(?: not|n't) exist|not exist\w*)\b",
    r"\bno longer (?:valid|exists|active|available|in use|with us)\b",
    rf"\b(?:no such|unknown|invalid|non-?existent|bad) (?:local )?{_WHO}\b",
    r"\bdoes(?: not|n't) have an? (?:\w{1,20} )?(?:account|mailbox)\b|\bno (?:account|mailbox) (?:by|with|for|here)\b",
    rf"\b{_CLOSED} {_WHO}\b|\b{_WHO}(?:s|\(s\))? (?:\w{{1,20}} ){{0,5}}{_CLOSED}\b",
    r"\bempf[äa]e?nger unbekannt|\butilisateur inconnu|\bdestinataire inconnu",
    r"\busuario desconocido|\butente sconosciuto",
    r"不存在|нет такого|не существует",
)
SHUT_MAILBOX = either(
    r"\b(?:mail ?box|recipient)(?: is)? (?:locked|frozen|unreachable|not (?:accepting|available|reachable))\b",
    r"\b(?:cannot|can't|(?:un|not )able to|could ?n[o']t) (?:reach|deliver to|open) (?:\w{1,20} )?mail ?box\b",
    r"\bunverified mail ?box\b",
)
RECIPIENT_REFUSES = either(
    r"\b(?:rejected|refused|blocked) by (?:the |this |your )?(?:recipient|receiver|user|addressee)s?\b(?!')",
    r"\bfailure for (?:\w{1,20} ){1,4}recipients?\b",
    r"\bto (?:send|post|write)\b.{0,16} to (?:\w{1,20} )?mail(?:ing)? list\b",
    r"\b(?:does not|doesn't) want\b|\bsuppression list\b|\ballowed[- ]senders\b",
    r"\b(?:recipient|receiver|user) (?:\w{1,20} )?(?:refuse|reject|block|den[iy]e?)(?:s|d|ed)? "
    r"(?:to|mail|e-?mail|messages?|your|this)\b",
)
UNVERIFIED = either(r"\brecipient address rejected: unverified address\b")
UNDELIVERABLE = either(r"\brecipient address rejected: un(?:deliverable|verified) address\b")
UNSURE = either(
    r"verif|check|look ?up|unable|could ?n[o']t|(?:temporary|internal|server) error|" + TIMEOUT,
    r"try|retry|wait|too many|rate|quota|full|limit",
)
# Postfix puts "<bob@example.com>: Recipient address rejected: " before whatever a policy says.
ONE_OF_MANY = either(
    r"\b(?:recipient(?! address rejected: )|mail ?box|user(?!@)|this (?:domain|address|account|message is))\b"
)
ADDRESSED = either(r"<[^<>@\s]{1,64}@[^<>\s]{1,255}>(?!: recipient address rejected: )")

# --- Whom it is about, where nothing else tells -----------------------------------------------------------------------

ABOUT_MESSAGE = either(
    r"spam|phish|malware|\bcontain",
    r"\bcontents?\b(?! of the helo)|\bheaders?\b|\bvirus|\bthis message\b|\bquarantin|\battach",
    r"\bbounce message\b|\bmulti-recipient|\bplain text\b|\bhtml\b|\blines?\b|\bdate\b|\bmessage-id\b",
    r"\btoo (?:large|big)\b|\bsize\b",
)
ABOUT_RECIPIENT = either(
    r"\b(?:recipient|subscriber|mailing list|alias|noreply address)\b",
    r"\b(?:so|no) such (?:user|e-?mail)\b|\bdoes ?n[o']t have an? \S{1,40} (?:account|mailbox)\b",
    r"\b(?:for|deliver\w{0,3}(?: message)?(?: to)?):? <?[^\s@<>]{1,64}@[^\s<>]{1,255}",
)
ABOUT_CLIENT = either(
    r"\b(?:helo|ehlo)\b",
    r"(?:^|[.;!] |\byour )connections? (?:is |was |are )?(?:not allowed|refused|rejected|denied|blocked)\b",
    r"\b(?:host|ip|client)s? (?:is |was |has been )?(?:not )?"
    r"(?:trusted|listed|banned|blocked|denied|refused|rejected|allowed)\b",
    r"\b(?:block|black|deny)[- ]?list(?:ed)? (?:host|ip|client|server)\b|\b(?:block|black) ?lists\b|\brbls?\b|/dul/",
    r"\b(?:broken|bad|unknown|your) (?:mailers?|mta)\b(?! error)|\bsmtp protocol\b|^protocol\b|\bnos services\b",
    r"\binput channel\b|\breconnect\w* to{1,2} fast\b",
    r"\b(?:ip|host|server|network)(?:/domain)? reputation\b|\breputation rate|\bsending activity\b|\bback off\b",
    r"\baccess denied, please try again later\b",  # Exchange Online, 4.7.500 to 4.7.699
)

AN_ADDRESS = either(r"\S@\S|\b(?:domain|address|mx|dns|envelope)\b|\bresolv|\bverif")  # at MAIL it is the sender's

# --- Now or never -----------------------------------------------------------------------------------------------------

FOR_NOW = either(
    r"\btempor(?:ar|är)\w*\b(?! e?-?mail| address| domain)|\btransient\b(?! ip)|\bdeferred\b",
    r"\b(?:try|retry|resend|send|come|again|attempt\w*)\b.{0,24}\blater\b|\blater\b.{0,8}\btry",
    r"\b(?:try|retry) (?:again )?(?:in|after|soon|shortly)\b",
    r"\bplus tard\b|\bm[aá]s tarde\b|\bmais tarde\b|\bpi[uù] tardi\b|\bsp[aä]ter\b",
    r"\bпозже\b|稍后|稍後",  # noqa: RUF001 - Russian is meant
)
GREYLIST = either(r"\bgr[ea]y[- ]?list", r"\bliste grise\b|\bgrau(?:e )?list|\blista gris\b|灰名单")
LOADED = either(r"\b(?:high|system|server) load\b|\boverload|\b(?:server|system) (?:is )?(?:too )?busy\b")
BUSY = either(r"\bmaintenance\b|\bgoing (?:down|offline)\b|\bshut(?:ting)? ?down", LOADED)
STORAGE = either(
    r"\b(?:insufficient|out of|not enough|unable to allocate)\b.{0,24}\b(?:disk|storage|space|memory|resources|buffer)",
    r"\bdisk\b.{0,12}\bfull|\bspace shortage|\bno space left",
    r"\b(?:system|queue|spool) (?:storage )?(?:is )?full",
)
UNAVAILABLE = either(
    r"\b(?:service|server|system|database|queue)\b.{0,24}\b(?:unavailable|not (?:available|accepting)|refused)"
)
HANGING_UP = either(
    r"(?:^|\btry again later,) ?(?:[\w.-]+ )?closing (?:the )?(?:connection|(?:transmission )?channel)\b"
)
SERVER_ERROR = either(
    r"\b(?:system|server|internal) (?:problem|error|failure|resource|configuration)",
    r"\bresources? (?:\w{1,20} )?(?:exhausted|exceeded|unavailable)|\b(?:no system|out of) resources\b",
    r"^qq |\b(?:unable to|cannot|could not) (?:read|open|write) (?:\w{1,20} ){0,2}"  # qmail
    r"(?:configuration|controls?|queue)\b",
    r"\btoo many open files\b|\b(?:can'?t|cannot|could not|unable to) connect to (?:127\.|localhost)",
    r"\b(?:unable to|cannot|can not|not) accept(?:ing)? (?:\w{1,20} )?(?:messages?|e?mails?|connections?)\b",
)

# --- The sender -------------------------------------------------------------------------------------------------------

SENDER_AUTH = either(
    r"\b(?:spf|dkim|dmarc)\b",
    r"\b(?:sender|e-?mail|message|mail) is (?:un|not )authenticated|\bunauthenticated (?:e-?mail|message)",
    r"\bauthentication (?:checks|information|level|results)\b",
)
NO_NAME = either(
    r"\bcannot find your (?:reverse )?host|\bname lookup failed",
    r"\bunverif[iy]+able (?:sending|host|ip)|^(?:helo|ehlo) \S{1,255} (?!first|required|before)",
    r"\b(?:helo|ehlo)\b.{0,80}\b(?:reject|invalid|block|refus|denied|must|fqdn|bad\w*|bare|not|fail|missing|mismatch)",
    r"\b(?:reverse\b.{0,24}\b(?:dns|hostname|host|name|lookup)|rdns|ptr)\b|\b(?:bad|invalid|forged) (?:helo|ehlo)\b",
    r"\b(?:cannot|could not|unable to|not) resolve\b.{0,20}\byour (?:ip|host)",
    r"\bno dns (?:entr|record)\w* for your (?:helo|ehlo|ip|host|(?:mail ?)?server)|\bcorrect (?:your )?(?:helo|ptr)\b"
    r"|\bcorrect your dns\b",
    r"\b(?:sender|sending|client|your) (?:ip|host)\b.{0,30}\bresolve",
    r"\d\.\d{1,3}\W? (?:host )?(?:does not|doesn't|cannot|can't|could not)(?: be)? resolve",
)
_LISTED = r"(?:block(?:ed|[- ]?list\w*|ing)?(?! list of)|(?:black|deny)-?list\w*|banned|den(?:y|ied)|listed|refused)\b"
_CLIENT = r"(?:ips?(?!=)|client|network|subnet|connecting host|your (?:host|server|isp|provider|network|mail server))\b"
_IP = r"(?<![=.\d])\d{1,3}\.\d{1,3}\.\d{1,3}\.\d"  # not in the query of a link
BLOCKED_CLIENT = either(
    r"\b(?:you|ip|host|server|network)\b.{0,24}\b(?:sent|sending) .{0,40}\bto (?:an? |our )?(?:\S{1,64} )?"
    r"spam ?traps?\b",
    r"\bclient (?:host|network|address)? ?(?:is |was )?reject|\byour (?:mail )?server requires\b",
    rf"\b{_CLIENT}.{{0,60}}\b{_LISTED}",
    rf"\b{_LISTED}.{{0,40}}\b{_CLIENT}|\byou (?:are|were|have been) (?:\w{{1,20}} )?{_LISTED}",
    rf"\b{_LISTED}.{{0,40}}{_IP}|{_IP}.{{0,40}}\b{_LISTED}",
    r"spamhaus|spamcop|\bbarracudacentral|\bsorbs\b|\buceprotect|\babuseat\b|\bspfbl\b|\brbls?\b|\bDT:RBL\b",
    r"\bdns ?(?:bls?\b|(?:black|block) ?list)",
    r"\b(?:ip|host|server|network|poor|bad|low|sending|sender) reputation\b|\breputation of\b",
    r"\bmessage from \W?\d[\d.]{6,14}\W{1,2}(?:rejected|refused|denied|blocked)\b(?! (?:as|for|because)\b|:)",
    r"\b(?:messages|connections?) from \W?\d{1,3}\.\d|\bfrom (?:this|your) (?:ip|host|server|client|network)\b",
    r"\b(?:sending|connecting) (?:mail ?)?(?:server|host|mta)\b|\bclient (?:is|was|has|not)\b",
    r"\btoo m(?:any|uch) (?:\w{1,20} ){1,5}from (?:your |this )?(?:ip|host|server|client)\b",
    r"\btoo many (?:invalid|unknown|bad|wrong|failed) (?:recipients|users|rcpts|addresses|commands)\b",
    r"\btoo many unauthenticated commands\b",
    r"\b(?:not|cannot|can't) (?:\w{1,20} ){0,2}(?:send|deliver) (?:us|me)\b(?! this)",
    r"\bintrusion prevention\b|\bspam source\b|(?<!not a )(?<!are you a )\bspammers?\b",
    r"\bconnections? from\b|(?<![=?&./#_-])\bip(?:s\b|\b(?![=/:]))",
    r"\byour (?:\w{1,20} )?(?:ip|host|network|subnet|country|isp|provider|mta|system|(?:mail ?)?server)\b",
    r"\bclient host (?:is|was|has)\b|\bopen (?:proxy|relay)\b",
    r"\b(?:host|client|mail|messages|server|ip(?: address)?) (?:from |at )?\W{0,2}\d{1,3}\.\d{1,3}\.\d{1,3}\.\d",
    r"\bdynamic (?:client|host|address)|\bresidential\b|\bdial-?up\b",
    r"\b(?:on|in) (?:our|a|the) (?:\w{1,20} )?(?:block|black|deny)-?list",
    r"(?:您|你)的ip|ip.{0,8}黑名单",
    r"\bHL:[A-Z]{3}\b|\b(?:MI|RP):C[CE]L\b|\bWM:BLI\b",  # NetEase, of this client
)
LISTED_CONTENT = either(
    r"\b(?:surbl|uribl|dbl|b-url)\b",
    r"(?<![/.=?&-])\b(?:uri|url|links?|body|content|headers?|subject|domain"
    r"|sender(?! ip\b| reputation| intelligence| ?score| ?\[\d))\b(?![./=]\w)",
    r"\b(?:detect|identif|classif|consider|scor|flagg|mark|look|appear|seem)\w* (?:as|like|to be) (?:\w{1,20} )?"
    r"(?:spam|junk|unsolicited)\b",
    r"\bby (?:our |the )?(?:anti-?spam|spam|content) (?:system|engine|server|filter|gateway)\b",
)
UNPROVEN = either(
    r"\b(?:address|domain|identity) (?:is )?not (?:yet )?verified\b|\bidentities failed the check\b",
)
NOT_YOURS = either(  # the sender is not the one who has logged in
    r"\bmail from (?:\w{1,20} ){0,2}(?:must|should|(?:does|do) ?n[o']t) (?:\w{1,20} ){0,3}(?:same|equal|conform|match)",
    r"\brelaying disallowed as\b|\bsend ?as ?denied",
)
SENDER = either(
    r"\bsender\b.{0,24}\b(?:(?:do|does) ?n[o']t|mis-?) ?match",
    r"\bsender(?:'s)? (?:address|domain|e-?mail|verif\w+"
    r"|denied|rejected|refused|blocked|unknown|invalid|\w*listed|banned|not|is not|has no)\b|\bpostmaster verif",
    r"\b(?:invalid|bad|unknown|unverified|forged|spoofed|null) (?:senders?|from|return|envelope)\b",
    r"\b(?:(?:mail ?)?from|sending) domain\b|\bdomain of (?:the )?sender\b",
    r"\breturn[- ](?:path|address)\b|\bfrom[- ]address\b|\benvelope (?:sender|from)\b",
    r"\bmail from:? <?[^\s@]{1,64}@\S{1,255} (?:is |was )?(?:den[iy]|refuse|reject|block|not (?:allow|accept|permit))",
    r"\bto send (?:mail |e-?mail )?(?:as|from|on behalf of)\b(?! (?:this|your|the) (?:ip|host|server)\b| \W?\d)",
    NOT_YOURS,
)
ACCOUNT = either(  # what has become of the account that this client sends with
    r"\bsending (?:is |was |has been )?(?:suspended|paused|disabled|blocked)\b|\bbad outbound sender\b|outboundspam"
    r"|\bunusual sending\b|\b(?:outgoing|outbound) (?:is |was )?blocked\b(?!.{0,40}\b(?:message|virus|attach|content))"
    r"|\bsuspended from (?:sending|out(?:bound|going))\b",
    r"\b(?:your|sending|smtp|sender's) (?:\w{1,20} ){0,2}(?:account|plan|tenant|subscription)\b.{0,40}"
    r"\b(?:suspend|paus|bann|block|disabl|expired|restrict|lock|exceed|limit|reach|compromis"
    r"|not (?:yet )?(?:activ|authori[sz]ed))",
    r"\bfrom your account\b|\btenant has exceeded|\bcredits? (?:exceeded|exhausted|used up)",
    r"\b(?:out of|insufficient|not enough) (?:credits?|balance|funds)\b|\bfor test purposes only\b"
    r"|\btrial (?:\w{1,20} )?(?:ended|expired|over)\b",
)
BLOCKED = either(
    r"\bblock(?:ed|list)|\bblack-?list|\b(?:rbl|dnsbl)\b|\blisted\b|\bbanned\b",
    r"spamhaus|spamcop|\breputation\b|\bpolicy restrictions",
)
