"""The tokens of a site by what they are: class token, registers, patches."""

from clipattr.clip.cut import Cut


def token_types(cut: Cut) -> dict[str, slice]:
    """Where each type stands on the token axis of x [batch, token, width].

    `all` comes last where there are several types; a site with one type has one entry, under the
    name of the site's tokens. A site of one token per image counts as an axis of length one.
    """
    trunk, tokens = cut.trunk, cut.site.tokens
    whole = {tokens: slice(None)}
    if tokens != "all" or trunk.reads_text:
        return whole
    n_cls = int(trunk.has_cls)
    types: dict[str, slice] = {}
    if n_cls:
        types["cls"] = slice(0, n_cls)
    if trunk.n_prefix > n_cls:
        types["registers"] = slice(n_cls, trunk.n_prefix)
    if not types:
        return whole
    return {**types, "spatial": slice(trunk.n_prefix, None), **whole}
