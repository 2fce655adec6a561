import inspect

import hf_cod


def test_every_public_name_is_there_and_documented():
    for name in hf_cod.__all__:
        thing = getattr(hf_cod, name)
        assert inspect.getdoc(thing), name
    assert hf_cod.__all__ == sorted(hf_cod.__all__)
