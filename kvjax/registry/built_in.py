"""The methods. One import line here makes a method known to the registry."""

from kvjax.methods.cascade.method import cascade as cascade
from kvjax.methods.decode_eviction import decode_eviction as decode_eviction
from kvjax.methods.dense_layers import dense_layers as dense_layers
from kvjax.methods.duo import duo as duo
from kvjax.methods.entmax_full import entmax_full as entmax_full
from kvjax.methods.entmaxkv.method import entmaxkv as entmaxkv
from kvjax.methods.expected_attention import expected_attention as expected_attention
from kvjax.methods.full import full as full
from kvjax.methods.h2o import h2o as h2o
from kvjax.methods.head_budgets import head_budgets as head_budgets
from kvjax.methods.keydiff import keydiff as keydiff
from kvjax.methods.knorm import knorm as knorm
from kvjax.methods.kvzip import kvzip as kvzip
from kvjax.methods.layer_budgets import layer_budgets as layer_budgets
from kvjax.methods.oracle_topk import oracle_topk as oracle_topk
from kvjax.methods.quantize import quantize as quantize
from kvjax.methods.quest import quest as quest
from kvjax.methods.random import random as random
from kvjax.methods.refreshkv.method import refreshkv as refreshkv
from kvjax.methods.refreshkv.refresh import refresh as refresh
from kvjax.methods.retro.method import retro as retro
from kvjax.methods.snapkv import snapkv as snapkv
from kvjax.methods.streaming_llm import streaming_llm as streaming_llm
from kvjax.methods.token_select import token_select as token_select
from kvjax.methods.topk_completion.method import topk_completion as topk_completion
from kvjax.methods.tova import tova as tova
