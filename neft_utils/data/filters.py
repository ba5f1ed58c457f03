"""Which texts are left out of ShareGPT, and which texts count as copies of each other.

The filters are crude on purpose: a good row lost costs nothing, a private one kept does.
"""

import re
from collections import defaultdict

import numpy as np

BOILERPLATE = 0.1  # 3-grams in more than this share of the rows say nothing about copying

# All of these see lower-cased text.
FUNCTION_WORD = re.compile(
    r"\b(?:a|about|all|an|and|are|as|at|be|but|by|can|do|for|from|had|has|have|he|her|his|how|i|if"
    r"|in|into|is|it|its|me|more|my|not|of|on|one|or|our|she|so|some|such|that|the|their|them|there"
    r"|these|they|this|to|was|we|were|what|when|which|who|will|with|would|you|your)\b"
)
REFUSAL = re.compile(  # the model talks about itself, declines or apologises
    r"\bas an? (?:ai|artificial|large|language|machine|text)\b|\b(?:ai|language) model|\bopenai\b"
    r"|\bi(?:'m| am) (?:sorry|unable|not able|afraid|just|an? (?:ai|artificial|machine))"
    r"|\bi (?:cannot|can ?not|can't|apologi[sz]e|don't have|do not have|was trained|am trained)"
    r"|\bmy (?:training|knowledge cutoff|previous (?:response|answer))|\bapologies\b"
)
META_PROMPT = re.compile(  # about chat models: prompts for them, jailbreaks, bulk marketing text
    r"chat ?gpt|\bgpt[- ]?\d|\bopenai\b|\bllms?\b|\blanguage model|\bjailbr|\bprompts?\b|midjourney"
    r"|stable diffusion|dall-?e\b|\bassistant\b|\bfrom now on\b|\b(?:ignore|disregard) (?:a|the)"
    r"|\bforget (?:all|every|what|about|the|any|our)|\bi want you to (?:be|act|respond|reply)\b"
    r"|\bare you (?:able|capable|human|conscious|an?)\b|\byour (?:training|knowledge|name)\b"
    r"|\bcan you (?:speak|read|access|browse|see|remember)\b|\buse you\b|\bmy name is\b|\bseo\b"
    r"|\bkeywords?\b|\boutrank|\bbacklink|\bplagiari"
)
PRIVATE = re.compile(  # addresses, numbers, credentials, and the texts that carry private names
    r"[\w.+-]+@[\w-]+\.\w+|\d{7,}|(?:\d[\s().-]{0,2}){9,}\d|\b\d{1,3}(?:\.\d{1,3}){3}\b"
    r"|\b\d{3}[-. ]\d{3,4}[-. ]\d{4}\b|\b(?=\w*\d)(?=\w*[a-z])\w{20,}\b|\b(?:sk-|akia)\w+"
    r"|\bpassword ?(?:is|:|=)|\bapi[ _-]?keys?\b|\bssn\b|\b(?:security|card|passport|account) num"
    r"|\b\d{1,5} \w+ (?:street|avenue|road|drive|lane|boulevard|st|ave|rd|blvd)\b|\[your name\]"
    r"|\bcover letter\b|\bcurriculum vitae\b|\bmy (?:resume|cv)\b|\b(?:regards|sincerely),"
    r"|\bdear [a-z]+[,!]|\b(?:hi|hello) (?!there|all|everyone|world)[a-z]+[,!]"
    r"|\bmy (?:new )?(?:wife|husband|girl|boy|fianc|partner|son\b|daughter|child|kid|mom|mum|mother"
    r"|dad|father|brother|sister|uncle|aunt|friend|acquaintance|boss|co-?worker|colleague)"
)
HARMFUL = re.compile(  # crude on purpose: a harmless "killer feature" is no loss
    r"\b(?:sex\w*|porn\w*|nsfw|erotic\w*|nud(?:e|es|ity)|naked|fetish\w*|rap(?:e|ed|ist|ists|ing)"
    r"|incest\w*|genital\w*|orgasm\w*|seduc\w*|prostitut\w*|suicid\w*|self[- ]harm\w*|murder\w*"
    r"|tortur\w*|massacre\w*|terroris\w*|bomb(?:s|ed|ing|er)?|explosives?|genocid\w*|nazi\w*|hitler"
    r"|holocaust|racis[mt]\w*|slurs?|fuck\w*|shit\w*|bitch\w*|assholes?|damn|cocaine|heroin|meth"
    r"|marijuana|cannabis|abus(?:e|ed|ive)|assault\w*|molest\w*|pedo\w*|kill(?:s|ed|ing|er)?|guns?"
    r"|weapons?|shoot\w*|stab(?:s|bed|bing)|hat(?:e speech|red)|violen\w*|corpse\w*|slave(?:s|ry)?"
    r"|hack(?:s|ed|ers?|ing)|penetration test\w*|insult\w*|roast|idiots?|stupid)\b"
)
DEBRIS = re.compile(  # links, markup, tables and buttons that the scraper took for text
    r"https?:|www\.|\b\w+\.(?:com|org|net|io|co|edu|gov)\b|</?[a-z][^>]*>|&(?:[a-z]+|#\d+);|\]\("
    r"|!\[|\|\s*:?-{2,}|\|.*\|.*\||\bcopy code\b|copycopy|^\d+ ?/ ?\d+$|regenerate response"
    r"|\bclick here\b|\bshare ?prompt\b|\bmodel: ?default\b|\[object|\butm_|\u200b"
    r"|\ufffd|\\[_*]|[\u3040-\ud7a3]",
    re.MULTILINE,
)
CODE = re.compile(  # programs, commands and formulas; plain prose about them may stay
    r"```|`[^`\n]+`|\bdef \w+\(|\bfunction \w+ ?\(|^\s*(?:import|from|#include|using) [\w.<>]+;?$"
    r"|\bselect\b.+\bfrom\b.+\b(?:where|join)\b|[;{}]\s*$|\w\(\)|\w+\.\w+\(|=>|==|\+=|:=|\$\{"
    r"|\\[a-z({\[]|\$\$|^\s*//|\b(?:public|static|void|const|var|let) \w+ ?[=(]|=\w+\("
    r"|\b(?:source|pseudo|sample|write|the|this|some|my) ?codes?\b",
    re.MULTILINE,
)
NO_CONTEXT = re.compile(  # asks about a text, a picture or an earlier turn that is not there
    r"\b(?:following|below|above|attached|previous|earlier|last|next|uploaded|pasted|this) (?:text"
    r"|article|paragraph|passage|sentence|email|message|document|content|essay|data|table|image"
    r"|picture|file|pdf|video|link|transcript|question|conversation|information|response)s?\b|:$"
    r"|^(?:how about|what about|let's go|okay?|yes|yeah|no|and|but|also|so|continue|go on|more"
    r"|another|again|rewrite|rephrase|paraphrase|proofread|translate|edit|summari[sz]e|correct"
    r"|shorten|improve)\b"
)
SETUP = re.compile(  # answers that only ask for the material or promise to start
    r"\b(?:please|could you|can you|would you|feel free to|if you(?: could)?) (?:please |can )?"
    r"(?:provide|share|send|give|specify|clarify|tell|let me know|go ahead|enter|paste|upload|type"
    r"|describe|elaborate|explain|ask)\b|\bwould you like\b|\b(?:how|what) (?:can|may) i\b"
    r"|\bi(?:'m| am) (?:ready|here to)\b|\bi(?:'d| would| will|'ll) be (?:happy|glad) to\b"
    r"|\b(?:understood|acknowledged|i understand|got it|do you (?:have|want|need))\b"
    r"|\bwhat (?:type|kind) of\b.*\?|\b(?:here to|i can) help\b"
)
# Name -> test of the lower-cased prompt p and response r; true for a row that stays.
_SHAREGPT = {
    "mostly ASCII": lambda p, r: len((p + r).encode("ascii", "ignore")) >= 0.97 * len(p + r),
    "English function words": lambda p, r: (
        FUNCTION_WORD.search(p) and len(FUNCTION_WORD.findall(r)) >= 0.15 * len(r.split())
    ),
    "no refusal, no talk about itself": lambda p, r: not REFUSAL.search(r),
    "no prompt about chat models": lambda p, r: not META_PROMPT.search(p),
    "nothing private": lambda p, r: not PRIVATE.search(p + "\n" + r),
    "nothing harmful": lambda p, r: not HARMFUL.search(p + "\n" + r),
    "no links, markup or buttons": lambda p, r: not DEBRIS.search(p + "\n" + r),
    "no code": lambda p, r: not CODE.search(p + "\n" + r),
    "prompt of 4 words or more": lambda p, r: len(p.split()) >= 4,
    "prompt complete in itself": lambda p, r: not NO_CONTEXT.search(p),
    "response ends a sentence": lambda p, r: re.search(r"[.!?][\"')\]*]*$", r),
    "response is no set-up": lambda p, r: (
        not (SETUP.search(r[:250]) or (len(r) < 300 and r.endswith("?")))
    ),
}


def _of_row(test):
    return lambda row: bool(test(row["prompt"].lower(), row["response"].lower()))


# Name -> function of a row, in the order in which they are applied.
SHAREGPT_FILTERS = {name: _of_row(test) for name, test in _SHAREGPT.items()}


# --------------------------------------------------------------------------- similarity of texts


def _words(text):
    return re.findall(r"\w+", text.lower())


def grams(text):
    """The set of 3-word sequences of a text; of a shorter text, the text itself."""
    words = _words(text)
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))} if words else set()


def similar_pairs(rows, threshold):
    """Yields (i, j, Jaccard) of every two rows whose 3-grams, of prompt and response together,
    overlap by the threshold or more; equal prompts count as 1.

    3-grams that a tenth of the rows share do not count: a template would chain all its rows.
    Exact and fast (prefix filtering): two similar sets have one of the few rarest 3-grams of
    each in common, so only rows that meet in the index of rare 3-grams are compared. Most 3-grams
    are in one row only: they fill the prefix and meet nobody.
    """
    places, numbers = _numbered_grams(rows)
    frequency = np.bincount(numbers)
    kept = frequency[numbers] <= max(20, BOILERPLATE * len(rows))
    places, numbers = places[kept], numbers[kept]
    sizes = np.bincount(places, minlength=len(rows))
    ends = sizes.cumsum()
    alone = np.bincount(places[frequency[numbers] == 1], minlength=len(rows))
    prefixes = sizes - np.ceil(threshold * sizes).astype(int) + 1 - alone
    sets, first, index = {}, {}, defaultdict(list)

    def set_of(i):
        if i not in sets:
            sets[i] = set(numbers[ends[i] - sizes[i] : ends[i]].tolist())
        return sets[i]

    for j, row in enumerate(rows):
        i = first.setdefault(" ".join(_words(row["prompt"])) or row["prompt"], j)
        if i != j:
            yield i, j, 1.0
        if prefixes[j] <= 0:
            continue
        own = numbers[ends[j] - sizes[j] : ends[j]]
        own = own[frequency[own] > 1]
        rarest = own[np.lexsort((own, frequency[own]))][: prefixes[j]].tolist()
        for i in sorted({i for gram in rarest for i in index[gram]}):
            shared = len(set_of(i) & set_of(j))
            jaccard = shared / (sizes[i] + sizes[j] - shared)
            if jaccard >= threshold:
                yield i, j, float(jaccard)
        for gram in rarest:
            index[gram].append(j)


def _numbered_grams(rows):
    """(row, number of a 3-gram) of each row's set of 3-grams, as two arrays in order of rows.

    Numbers stand for 3-grams as `grams` makes them, equal ones for equal ones.
    """
    import pandas as pd  # here, because those who only read rows need not wait for it

    known, flat, texts, owners = {}, [], [], []
    for place, row in enumerate(rows):
        for text in (row["prompt"], row["response"]):
            found = [known.setdefault(word, len(known) + 1) for word in _words(text)]
            if 0 < len(found) < 3:
                found += [0] * (3 - len(found))  # a shorter text is one gram by itself
            flat += found
            texts.append(len(found))
            owners.append(place)
    flat = np.array([*flat, 0, 0], np.int64)
    begins = np.arange(len(flat) - 2)
    texts, owners = np.array(texts, np.int64), np.array(owners, np.int64)
    left = np.repeat(texts.cumsum(), texts) - begins  # words of the text from here to its end
    begins, owners = begins[left >= 3], np.repeat(owners, texts)[left >= 3]
    # In two steps, since three numbers of words need not fit into one of 64 bits. By hash tables:
    # sorting that many numbers takes several times as long.
    size = len(known) + 1
    pairs, _ = pd.factorize(flat[begins] * size + flat[begins + 1])
    triples, found = pd.factorize(pairs * size + flat[begins + 2])
    once = pd.unique(owners * max(1, len(found)) + triples)
    return np.divmod(once, max(1, len(found)))


def connected(n, pairs):
    """For each of n items, the smallest index that it is connected to through the pairs."""
    parent = list(range(n))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]  # halve the path: later look-ups are short
        return i

    for i, j in pairs:
        low, high = sorted((root(i), root(j)))
        parent[high] = low
    return [root(i) for i in range(n)]
