"""BibTeX of the papers that methods come from, and of kvjax itself.

A method's docstring names its papers by arXiv id; what else an entry needs is in the
table here. `CITATION.cff` is written from :data:`KVJAX` too.
"""

import re
import unicodedata
from typing import NamedTuple


class Paper(NamedTuple):
    """One paper as arXiv has it; its year is that of its id."""

    title: str
    authors: tuple[str, ...]


class Software(NamedTuple):
    """A program that can be cited."""

    name: str
    title: str
    authors: tuple[str, ...]  # groups, not persons
    year: int
    license: str
    message: str


PAPERS = {
    "1706.03762": Paper(
        "Attention Is All You Need",
        (
            *("Ashish Vaswani", "Noam Shazeer", "Niki Parmar", "Jakob Uszkoreit"),
            *("Llion Jones", "Aidan N. Gomez", "Łukasz Kaiser", "Illia Polosukhin"),
        ),
    ),
    "1905.05702": Paper(
        "Sparse Sequence-to-Sequence Models",
        ("Ben Peters", "Vlad Niculae", "André F. T. Martins"),
    ),
    "2306.14048": Paper(
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large "
        "Language Models",
        (
            *("Zhenyu Zhang", "Ying Sheng", "Tianyi Zhou", "Tianlong Chen"),
            *("Lianmin Zheng", "Ruisi Cai", "Zhao Song", "Yuandong Tian"),
            *("Christopher Ré", "Clark Barrett", "Zhangyang Wang", "Beidi Chen"),
        ),
    ),
    "2309.17453": Paper(
        "Efficient Streaming Language Models with Attention Sinks",
        (
            *("Guangxuan Xiao", "Yuandong Tian", "Beidi Chen", "Song Han"),
            "Mike Lewis",
        ),
    ),
    "2401.06104": Paper(
        "Transformers are Multi-State RNNs",
        (
            *("Matanel Oren", "Michael Hassid", "Nir Yarden", "Yossi Adi"),
            "Roy Schwartz",
        ),
    ),
    "2404.14469": Paper(
        "SnapKV: LLM Knows What You are Looking for Before Generation",
        (
            *("Yuhong Li", "Yingbing Huang", "Bowen Yang", "Bharat Venkitesh"),
            *("Acyr Locatelli", "Hanchen Ye", "Tianle Cai", "Patrick Lewis"),
            "Deming Chen",
        ),
    ),
    "2406.09827": Paper(
        "A Training-free Sub-quadratic Cost Transformer Model Serving Framework with "
        "Hierarchically Pruned Attention",
        (
            *("Heejun Lee", "Geon Park", "Youngwan Lee", "Jaduk Suh", "Jina Kim"),
            *("Wonyoung Jeong", "Bumsik Kim", "Hyemin Lee", "Myeongjae Jeon"),
            "Sung Ju Hwang",
        ),
    ),
    "2406.10774": Paper(
        "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
        (
            *("Jiaming Tang", "Yilong Zhao", "Kan Zhu", "Guangxuan Xiao"),
            *("Baris Kasikci", "Song Han"),
        ),
    ),
    "2406.11430": Paper(
        "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
        ("Alessio Devoto", "Yu Zhao", "Simone Scardapane", "Pasquale Minervini"),
    ),
    "2406.12018": Paper(
        "CItruS: Chunked Instruction-aware State Eviction for Long Sequence Modeling",
        (
            *("Yu Bai", "Xiyuan Zou", "Heyan Huang", "Sanxing Chen"),
            *("Marc-Antoine Rondeau", "Yang Gao", "Jackie Chi Kit Cheung"),
        ),
    ),
    "2406.17808": Paper(
        "Training-Free Exponential Context Extension via Cascading KV Cache",
        (
            *("Jeffrey Willette", "Heejun Lee", "Youngwan Lee", "Myeongjae Jeon"),
            "Sung Ju Hwang",
        ),
    ),
    "2407.11550": Paper(
        "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for "
        "Efficient LLM Inference",
        ("Yuan Feng", "Junlin Lv", "Yukun Cao", "Xike Xie", "S. Kevin Zhou"),
    ),
    "2409.12490": Paper(
        "CritiPrefill: A Segment-wise Criticality-based Approach for Prefilling "
        "Acceleration in LLMs",
        (
            *("Junlin Lv", "Yuan Feng", "Xike Xie", "Xin Jia", "Qirong Peng"),
            "Guiming Xie",
        ),
    ),
    "2410.10819": Paper(
        "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and "
        "Streaming Heads",
        (
            *("Guangxuan Xiao", "Jiaming Tang", "Jingwei Zuo", "Junxian Guo"),
            *("Shang Yang", "Haotian Tang", "Yao Fu", "Song Han"),
        ),
    ),
    "2411.02886": Paper(
        "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for "
        "LLMs via Dynamic Token-Level KV Cache Selection",
        (
            *("Wei Wu", "Zhuoshi Pan", "Kun Fu", "Chao Wang", "Liyi Chen"),
            *("Yunchu Bai", "Tianfu Wang", "Zheng Wang", "Hui Xiong"),
        ),
    ),
    "2411.05787": Paper(
        "RefreshKV: Updating Small KV Cache During Long-form Generation",
        ("Fangyuan Xu", "Tanya Goyal", "Eunsol Choi"),
    ),
    "2411.09688": Paper(
        "Squeezed Attention: Accelerating Long Context Length LLM Inference",
        (
            *("Coleman Hooper", "Sehoon Kim", "Hiva Mohammadzadeh"),
            *("Monishwaran Maheswaran", "Sebastian Zhao", "June Paik"),
            *("Michael W. Mahoney", "Kurt Keutzer", "Amir Gholami"),
        ),
    ),
    "2502.08910": Paper(
        "InfiniteHiP: Extending Language Model Context Up to 3 Million Tokens on a "
        "Single GPU",
        ("Heejun Lee", "Geon Park", "Jaduk Suh", "Sung Ju Hwang"),
    ),
    "2504.15364": Paper(
        "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM "
        "Inference in Resource-Constrained Environments",
        (
            *("Junyoung Park", "Dalton Jones", "Matthew J. Morse", "Raghavv Goel"),
            *("Mingu Lee", "Chris Lott"),
        ),
    ),
    "2402.06082": Paper(
        "SubGen: Token Generation in Sublinear Time and Memory",
        ("Amir Zandieh", "Insu Han", "Vahab Mirrokni", "Amin Karbasi"),
    ),
    "2402.02750": Paper(
        "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
        (
            *("Zirui Liu", "Jiayi Yuan", "Hongye Jin", "Shaochen Zhong"),
            *("Zhaozhuo Xu", "Vladimir Braverman", "Beidi Chen", "Xia Hu"),
        ),
    ),
    "2404.00456": Paper(
        "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
        (
            *("Saleh Ashkboos", "Amirkeivan Mohtashami", "Maximilian L. Croci"),
            *("Bo Li", "Pashmina Cameron", "Martin Jaggi", "Dan Alistarh"),
            *("Torsten Hoefler", "James Hensman"),
        ),
    ),
    "2505.24133": Paper(
        "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models",
        (
            *("Zefan Cai", "Wen Xiao", "Hanshi Sun", "Cheng Luo", "Yikai Zhang"),
            *("Ke Wan", "Yucheng Li", "Yeyang Zhou", "Li-Wen Chang", "Jiuxiang Gu"),
            *("Zhen Dong", "Anima Anandkumar", "Abedelkadir Asi", "Junjie Hu"),
        ),
    ),
    "2508.09001": Paper(
        "Retrospective Sparse Attention for Efficient Long-Context Generation",
        ("Seonghwan Choi", "Beomseok Kang", "Dongwon Jo", "Jae-Joon Kim"),
    ),
    "2505.23416": Paper(
        "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction",
        (
            *("Jang-Hyun Kim", "Jinuk Kim", "Sangwoo Kwon", "Jae W. Lee"),
            *("Sangdoo Yun", "Hyun Oh Song"),
        ),
    ),
    "2510.00636": Paper(
        "Expected Attention: KV Cache Compression by Estimating Attention from Future "
        "Queries Distribution",
        ("Alessio Devoto", "Maximilian Jeblick", "Simon Jégou"),
    ),
    "2604.05438": Paper(
        "Top-K Retrieval with Fixed-Size Linear-Attention Completion: Backbone- and "
        "KV-Format-Preserving Attention for KV-Cache Read Reduction",
        ("Yasuto Hoshi", "Daisuke Miyashita", "Jun Deguchi"),
    ),
    "2605.21649": Paper(
        "EntmaxKV: Support-Aware Decoding for Entmax Attention",
        ("Gonçalo Duarte", "Miguel Couceiro", "Marcos V. Treviso"),
    ),
    "2609.03430": Paper(
        "Random Attention: Rethinking KV Cache Eviction for Efficient Reasoning",
        (
            *("Heng Wang", "Jielin Qiu", "Wenting Zhao", "Cheng Qian"),
            *("Liangwei Yang", "Jiawei Han", "Heng Ji", "Silvio Savarese"),
            *("Shelby Heinecke", "Huan Wang"),
        ),
    ),
}

KVJAX = Software(
    name="kvjax",
    title="kvjax: decoding with long contexts in JAX",
    authors=("The kvjax authors",),
    year=2026,
    license="Apache-2.0",
    message="If you use kvjax, please cite it, and the papers of the methods you used.",
)


def arxiv_ids(source: str) -> list[str]:
    """Returns the arXiv ids that a method's source names, each once, in order."""
    return list(dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{5})", source)))


def paper_entry(arxiv: str) -> str:
    """Returns the BibTeX entry of a paper in :data:`PAPERS`.

    Raises:
        ValueError: if the table has no such paper.
    """
    if arxiv not in PAPERS:
        raise ValueError(
            f"{arxiv=} is not among the papers of kvjax.registry.citations."
        )
    return _arxiv_entry(arxiv, PAPERS[arxiv])


def entries(source: str) -> list[str]:
    """Returns the BibTeX entry of every paper that a method's source names.

    One that :data:`PAPERS` lacks has what the source says: surnames and a title.
    """
    return [
        _arxiv_entry(arxiv, PAPERS.get(arxiv) or _read(arxiv, source))
        for arxiv in arxiv_ids(source)
    ]


def _read(arxiv: str, source: str) -> Paper:
    """The paper as a source words it: names, "Title", where, arXiv:id."""
    words = r'(?:^|[.:;] )([^".:;]*(?:et al\.)?), "([^"]+?),?"'
    stated = re.search(rf'{words}(?:(?!arXiv:)[^"])*arXiv:{arxiv}', source)
    who, title = stated.groups() if stated else ("", f"arXiv:{arxiv}")
    names = [name.strip() for name in who.removesuffix("et al.").split(",")]
    others = ["others"] if who.endswith("et al.") else []
    return Paper(title, tuple(filter(None, [*names, *others])))


def _arxiv_entry(arxiv: str, paper: Paper) -> str:
    year = 2000 + int(arxiv[:2])
    first = paper.authors[0].split()[-1] if paper.authors else "arXiv"
    author = {"author": " and ".join(paper.authors)} if paper.authors else {}
    return _entry(
        "misc",
        f"{_ascii(first)}{year}{_ascii(paper.title.split()[0])}",
        title=f"{{{paper.title}}}",
        **author,
        year=str(year),
        eprint=arxiv,
        archivePrefix="arXiv",
        url=f"https://arxiv.org/abs/{arxiv}",
    )


def software_entry(version: str, software: Software = KVJAX) -> str:
    """Returns the BibTeX entry of a version of a program, by default of kvjax."""
    return _entry(
        "software",
        f"{software.name}{software.year}",
        title=f"{{{software.title}}}",
        author=" and ".join(f"{{{name}}}" for name in software.authors),
        year=str(software.year),
        version=version,
        license=software.license,
    )


def citation_file(version: str, software: Software = KVJAX) -> str:
    """Returns the text of `CITATION.cff`, by default of kvjax."""
    authors = "".join(f'  - name: "{name}"\n' for name in software.authors)
    return (
        "cff-version: 1.2.0\n"
        f'message: "{software.message}"\n'
        "type: software\n"
        f'title: "{software.title}"\n'
        f"authors:\n{authors}"
        f'version: "{version}"\n'
        f"license: {software.license}\n"
    )


def _entry(kind: str, key: str, **fields: str) -> str:
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])


def _ascii(word: str) -> str:
    plain = unicodedata.normalize("NFKD", word).encode("ascii", "ignore").decode()
    return re.sub(r"\W|_", "", plain).lower()
