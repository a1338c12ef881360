from mohawk.demo.prose import strip_wikitext, unwrap


def test_unwrap_joins_lines_and_drops_layout():
    text = (
        "     CHAPTER I\n\n"
        "  It was a bright  cold day in April,\r\nand the clock-\n  work--\nold - was\n striking.\n \n"
        "+++++++++\n\n * * * \n\nSecond paragraph, quite long enough to stay.\n\x1a"
    )
    assert unwrap(text) == (
        "It was a bright cold day in April, and the clock-work--old - was striking.\n\n"
        "Second paragraph, quite long enough to stay.\n"
    )


def test_wikitext_leaves_its_paragraphs():
    source = """{{Infobox animal
| name = Aardvark {{small|(mammal)}}
}}
[[File:Aardvark.jpg|thumb|An [[aardvark]] in its [[burrow|den]].]]
The '''aardvark''' is a [[mammal]]<ref name="a">{{cite|u=x}}</ref> of [[Africa|the continent]].<ref name="b"/>

== Habits ==
* It digs, and it digs, and it digs, all night long, every night.
{| class="wikitable"
| a || b {{c}}
|}
It is &quot;nocturnal&quot; and feeds on [http://example.org ants and termites], &amp; little else.<!-- really? -->
Too short.
[[Category:Mammals]]"""
    assert strip_wikitext(source) == (
        "The aardvark is a mammal of the continent.\n\n"
        'It is "nocturnal" and feeds on ants and termites, & little else.\n'
    )
