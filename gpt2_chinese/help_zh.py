"""What --help says, in Chinese: a table of two columns. A test finds the left one in the code, and each flag in it."""

from __future__ import annotations

DESCRIPTIONS = {
    "build_trainfile.py": "把文本文件汇总为 data/train.json。",
    "make-vocab.py": "由 data/train.json 生成词表。",
    "make-tokenized.py": "把 data/train.json 分词并编码为 token ID。",
    "generate.py": "用训练好的模型续写文本。不带 --prefix 时逐条询问要续写的文本，输入空行结束。",
    "server.py": "通过 HTTP 提供训练好的模型的续写。",
    "python -m gpt2_chinese.gguf": "把模型文件夹写成一个 GGUF 文件，供 llama.cpp 使用。",
    "train.py": """\
用编码好的语料训练 GPT-2，并保存为 Hugging Face 格式的文件夹。

读取    tokenized/tokenized_train_{i}.txt（以及 tokenized/manifest.json）、vocab/vocab_user.txt、
        config/model_config*.json，或者用来继续训练的模型文件夹
写入    每轮之后的 model/model_epoch{n}/、model/final_model/、model/best_model/（按验证集）、
        用于断点续训的 model/checkpoints/step_{n}/、model/metrics.jsonl、tensorboard_summary/；
        加上 --report 还有 model/report.html 和 model/report.json

    python train.py --model_config config/model_config_mini.json --epochs 10 --lr 1e-3
    python train.py --device 0,1 --batch_size 16 --pretrained_model model/final_model --output_dir model2/
    python train.py --model_config config/model_config_mini.json --epochs 10 --lr 1e-3 --resume
    python train.py --minutes 30
    python train.py --eval_only --pretrained_model model/final_model --tokenized_data_path other/
""",
}

FLAGS = {
    "show this help message and exit": "显示本帮助并退出",
    "no settings, notes and progress bars": "不显示设置、说明和进度条",
    "the language of messages and of this help; by default as the locale (LANG) says": (
        "消息和本帮助的语言；默认按区域设置（LANG）"
    ),
    # build_trainfile.py
    "the folder of the text files; subfolders are read too": "文本文件所在的文件夹，包括子文件夹",
    "the file to write": "要写的文件",
    "of the files: a name such as utf-8, gb18030, big5, or auto to tell each file's": (
        "文件的编码：utf-8、gb18030、big5 等名称，或用 auto 逐个文件识别"
    ),
    "what to do at bytes that are not in the encoding, lines that are not JSON, and damaged e-books": (
        "遇到不符合编码的字节、不是 JSON 的行和损坏的电子书时怎么办：停止、跳过或替换"
    ),
    "of JSON lines, CSV and TSV: the field or column with the text, or several with commas between; found by itself "
    "where only one can be meant": (
        "JSON Lines、CSV 和 TSV 里正文所在的字段或列，多个用逗号分隔；只有一种可能时自动找到"
    ),
    "what a document is; a paragraph ends at a blank line, auto chooses for each file; a record of JSON lines, CSV "
    "or TSV is one, or is divided into paragraphs or chapters": (
        "一篇文档是什么：行、段落（以空行结束）、章节或整个文件，auto 逐个文件选择；JSON Lines、CSV、TSV 的一条记录"
        "是一篇，也可以再分为段落或章节"
    ),
    "join lines that are broken where a page was full (text from PDF)": "把因页宽而折断的行接起来（来自 PDF 的文本）",
    "clean the texts; without RULES all but simplified, otherwise names with commas between, no-NAME to turn one "
    "off: mojibake, html, invisible, simplified, punctuation, indents, ads, repeated": (
        "清洗文本；不写 RULES 时用除 simplified 以外的全部规则，否则写用逗号分隔的规则名，no-NAME 关闭一条：mojibake"
        "（乱码）、html、invisible（不可见字符）、simplified（繁体转简体）、punctuation（重复标点）、indents（缩进）"
        "、ads（网站广告）、repeated（反复出现的行）"
    ),
    "write twenty examples of each rule and of duplicates": "把每条规则和重复文档的二十个例子写到这个文件",
    "leave out documents that repeat an earlier one: exact, or near (also nearly the same; what the flag alone "
    "means)": "去掉与前面重复的文档：exact 为完全相同，near 还包括几乎相同的（只写参数名时的含义）",
    "of near duplicates: the share of common pairs of neighbouring characters, from which on they are one": (
        "近似重复的界限：相邻两字组合的相同比例达到它，就算同一篇"
    ),
    "write nothing; say on one screen what the texts are and what is wrong with them, in Chinese or English as LANG "
    "says": "什么也不写；用一屏说明这些文本是什么、有什么问题，按 LANG 用中文或英文",
    # make-vocab.py
    "the corpus, from build_trainfile.py": "语料，来自 build_trainfile.py",
    "the file to write; by default vocab/vocab_user.txt, for bpe vocab/tokenizer.json": (
        "要写的文件；默认为 vocab/vocab_user.txt，bpe 为 vocab/tokenizer.json"
    ),
    "replace a vocabulary that is not of this corpus, or not of this script": (
        "替换来自别的语料或不是本脚本生成的词表"
    ),
    "what a token is: THULAC's words, single characters (BERT's WordPiece), or byte-level BPE": (
        "token 是什么：THULAC 的词、单字（BERT 的 WordPiece）或字节级 BPE"
    ),
    "tokens at most; for words and characters the five special tokens are not counted; auto grows with the square "
    "root of the corpus, which suits a small model, and learns BPE from a part of a large corpus": (
        "token 数的上限；词和单字的词表不计五个特殊 token；auto 随语料的平方根增长，适合小模型，BPE 从大语料的一部分"
        "学习"
    ),
    "write GPT2-Chinese's vocabulary byte for byte, with its gaps": "逐字节写出 GPT2-Chinese 的词表，包括它的缺漏",
    "keep upper case; otherwise letters become lower case": "保留大写字母；否则一律转为小写",
    "keep white space beside Chinese, as the token 〿; otherwise it is dropped": (
        "保留中文旁边的空白，作为 token 〿；否则丢弃"
    ),
    "processes on this machine": "本机上的进程数",
    "a Dask scheduler to run on, such as tcp://host:8786": "在这个 Dask 调度器上运行，例如 tcp://host:8786",
    "the model whose parameters the report compares the embedding with": "报告拿词嵌入与哪个模型的参数量比较",
    "write the coverage of several sizes as JSON, too": "另把几种词表大小的覆盖率写成 JSON",
    # make-tokenized.py
    "the vocabulary, from make-vocab.py or elsewhere; a tokenizer.json; or a model folder": (
        "词表，来自 make-vocab.py 或别处；也可以是 tokenizer.json 或模型文件夹"
    ),
    "the folder to write to": "要写到的文件夹",
    "files to split the documents into": "把文档分成几个文件",
    "documents of more characters than this are kept": "只保留字数多于它的文档",
    "write GPT2-Chinese's ids byte for byte, with its [UNK]s": "逐字节写出 GPT2-Chinese 的 token ID，包括它的 [UNK]",
    "THULAC's words, BERT's WordPiece over single characters, or byte-level BPE; by default recognised by the "
    "vocabulary": "THULAC 的词、单字上的 BERT WordPiece 或字节级 BPE；默认由词表识别",
    "tokens around a document, by default those of the tokenizer: [MASK] and [CLS] as GPT2-Chinese has them, [CLS] "
    "and [SEP] for a folder with BERT's tokenizer, the end of text for BPE": (
        "文档首尾的 token，默认按分词器：GPT2-Chinese 的 [MASK] 和 [CLS]，带 BERT 分词器的文件夹为 [CLS] 和 [SEP]，"
        "BPE 为文本结束符"
    ),
    "keep upper case; by default as make-vocab.py was told": "保留大写字母；默认与 make-vocab.py 相同",
    "keep white space beside Chinese; by default as make-vocab.py was told": (
        "保留中文旁边的空白；默认与 make-vocab.py 相同"
    ),
    "go on where a fifth and more of the tokens are [UNK]": "五分之一以上的 token 是 [UNK] 时仍然继续",
    "replace pieces of another corpus or another vocabulary": "替换来自别的语料或别的词表的文件",
    # train.py
    "train for so long: the shape, the epochs and the settings that no flag says are planned, from the corpus and "
    "the speed of this machine (default: no plan)": (
        "训练这么多分钟：模型结构、轮数和没有用参数指定的设置由语料和本机速度规划（默认：不规划）"
    ),
    "with --minutes: print the plan and train nothing": "与 --minutes 一起用：只打印规划，不训练",
    "folder of the tokenized pieces": "编码好的语料所在的文件夹",
    "vocabulary of the pieces (default: the one in their manifest, else vocab/vocab_user.txt)": (
        "语料的词表（默认：语料的 manifest 里的词表，没有则为 vocab/vocab_user.txt）"
    ),
    "run make-tokenized.py first, with these flags of it: --raw_data_path, --num_pieces, --min_length, --segment "
    "for a vocabulary of words, --bpe_token for BPE": (
        "先运行 make-tokenized.py，可带它的这些参数：--raw_data_path、--num_pieces、--min_length，词的词表用 "
        "--segment，BPE 用 --bpe_token"
    ),
    "train on pieces of which a fifth and more of the tokens are [UNK]": "五分之一以上的 token 是 [UNK] 时仍然训练",
    "shape of a new model": "新模型的结构",
    "model folder to continue training from, ours or GPT2-Chinese's (default: a new model)": (
        "从这个模型文件夹继续训练，本项目的或 GPT2-Chinese 的（默认：新模型）"
    ),
    "with --pretrained_model: tokens around a document, if the folder does not tell them right": (
        "与 --pretrained_model 一起用：文档首尾的 token，文件夹里写得不对时用"
    ),
    "initialisation of a new model's token embedding: normal, as the other weights; or a factorisation of the "
    "corpus's co-occurrence statistics, from which it learns faster": (
        "新模型词嵌入的初始化：normal 与其他权重一样；cooccurrence 为语料共现统计的分解，学得更快"
    ),
    "folder of the model folders and checkpoints": "模型文件夹和检查点所在的文件夹",
    "delete an earlier run in --output_dir: its models, checkpoints, metrics and TensorBoard events": (
        "删除 --output_dir 里以前的训练：模型、检查点、指标和 TensorBoard 日志"
    ),
    "TensorBoard folder": "TensorBoard 文件夹",
    "updates between two TensorBoard points": "每隔多少训练步写一个 TensorBoard 点",
    "updates between two checkpoints, besides those after each epoch; 0 is none (default: one every 10 minutes)": (
        "除每轮之后以外，每隔多少训练步保存一个检查点，0 表示不保存（默认：每 10 分钟一个）"
    ),
    "checkpoints to keep, the latest": "保留最近几个检查点",
    "resume from the latest valid checkpoint of --output_dir, or from one that is named, exactly as if the run had "
    "never stopped; none deletes the checkpoints of an interrupted run and starts over (default: a new run, unless "
    "there is an interrupted one)": (
        "断点续训：从 --output_dir 里最新的有效检查点或指定的检查点继续，结果与没有中断过完全一样；none 删除中断的训"
        "练的检查点，从头开始（默认：新的训练，除非有中断的）"
    ),
    "share of the text held out as validation set: whole documents, and slices of long ones; 0 trains on all of it": (
        "留作验证集的文本比例：整篇文档，长文档则取其中几段；0 表示全部用来训练"
    ),
    "bounds of the validation set, in bytes of UTF-8, three a Chinese character; the lower one is at most a fifth "
    "of the text (default: 12000 3000000)": (
        "验证集大小的下限和上限，按 UTF-8 字节计，一个汉字三个；下限不超过文本的五分之一（默认：12000 3000000）"
    ),
    "measure with the factor on the logits (1 / temperature) that suits the validation set best, and save "
    "best_model and final_model with it: a model that sees its text several times is too sure of itself": (
        "测量时给 logits 乘上最适合验证集的系数（温度的倒数），best_model 和 final_model 按它保存：多次看同一文本的"
        "模型过于自信"
    ),
    "stop after so many measurements in a row without fewer bits per character; 0 never stops": (
        "验证集每字比特数连续这么多次没有下降就停止；0 表示从不提前停止"
    ),
    "updates between two measurements, besides those after each epoch; 0 is none": (
        "除每轮之后以外，每隔多少训练步评估一次；0 表示不评估"
    ),
    "prompts to complete at every measurement: a file with one a line, or a list separated by commas or semicolons, "
    "also the Chinese ones (default: none)": (
        "每次评估时续写的提示词：一行一个的文件，或用逗号、分号（中英文均可）分隔的列表（默认：无）"
    ),
    "at the end of the run write report.html and report.json to --output_dir: curves, completions, how much of them "
    "is copied (default: no)": (
        "训练结束时把 report.html 和 report.json 写到 --output_dir：曲线、续写和其中照抄原文的比例（默认：否）"
    ),
    "write the report of a finished run again, by its --output_dir": (
        "为已结束的训练重写报告，参数是它的 --output_dir"
    ),
    "measure --pretrained_model on all documents of --tokenized_data_path; no training": (
        "在 --tokenized_data_path 的全部文档上评估 --pretrained_model，不训练"
    ),
    "passes over the corpus": "训练轮数",
    "updates at most, also in the middle of an epoch; 0 is no limit": "训练步数的上限，可以停在一轮中间；0 表示不限",
    "windows of a micro-batch, over all devices together": "一个微批的窗口数，所有设备合计",
    "micro-batches of an update": "每个训练步累积几个微批（梯度累积）",
    "tokens from one window to the next, at most n_ctx - 1; a quarter of n_ctx shows a small corpus at other "
    "positions too, which delays overfitting": (
        "相邻两个窗口相隔的 token 数，最多 n_ctx - 1；取 n_ctx 的四分之一时，小语料会出现在不同的位置上，过拟合来得更晚"
    ),
    "cut the windows at other places in each epoch, which delays overfitting": (
        "每轮在不同的位置切分窗口，过拟合来得更晚"
    ),
    "tokens attend to their own document only, and positions are counted from its beginning, as completions are": (
        "token 只看自己的文档，位置从文档开头数起，与续写时一样"
    ),
    "peak learning rate (default: 0.00015; 5e-05 with --pretrained_model)": (
        "峰值学习率（默认：0.00015；有 --pretrained_model 时为 5e-05）"
    ),
    "updates of linear warm-up (default: 2000, at most a tenth of the run)": (
        "线性预热的训练步数（默认：2000，最多为全程的十分之一）"
    ),
    "of the learning rate after the warm-up: linear decay to 0; constant, then linear decay to 0 over "
    "--decay_fraction of the run; cosine decay to 0": (
        "预热之后学习率的变化：linear 线性降到 0；wsd 保持不变，在最后 --decay_fraction 的步数里线性降到 0；cosine "
        "按余弦降到 0"
    ),
    "share of the run that wsd decays in": "wsd 用来下降的步数占全程的比例",
    "muon is Muon for the weight matrices of the layers and AdamW for the rest": (
        "muon 表示各层的权重矩阵用 Muon，其余用 AdamW"
    ),
    "peak learning rate of Muon (default: --lr)": "Muon 的峰值学习率（默认：--lr）",
    "decoupled weight decay, as a share of the learning rate; norms and biases do not decay": (
        "解耦的权重衰减，按学习率的比例；归一化层和偏置不衰减"
    ),
    "of the matrices that Muon updates (default: --weight_decay)": (
        "Muon 更新的矩阵的权重衰减（默认：--weight_decay）"
    ),
    "of the embedding, the attention and the residual branches (default: what --model_config says)": (
        "词嵌入、注意力和残差分支的 dropout（默认：按 --model_config）"
    ),
    "model folders of the same vocabulary, or --output_dir of runs: learn the mean of their predictions beside the "
    "text; an empty value keeps --minutes from planning teachers (default: none)": (
        "教师模型：词表相同的模型文件夹，或训练的 --output_dir；除文本外还学习它们预测的平均值；空值让 --minutes 不"
        "规划教师模型（默认：无）"
    ),
    "of the teachers in what is learnt; the rest is the text's": "学习目标中教师模型的比例，其余是文本的",
    "with --optimizer muon: peak learning rate of the vectors that the embeddings of tokens with the same first or "
    "last character share (0: they share none)": (
        "用于 --optimizer muon：首字或末字相同的 token 的嵌入共享一些字向量，这是字向量的最高学习率（0：不共享）"
    ),
    "of a trigram of the tokens, and a cache of those before in the document, in what is learnt, for texts that are "
    "memorised (0: none); with --teacher both shares together are at most 1": (
        "学习目标中 token 三元语法（trigram）和文档缓存的比例，用于会背下的文本（0：不用）；使用 --teacher 时"
        "两个比例合计不超过 1"
    ),
    "stop after so many updates in a row whose loss or gradient is not finite; none of them is applied": (
        "损失或梯度连续这么多步不是有限数就停止；这些步都不会更新权重"
    ),
    "clip gradients to this norm": "把梯度裁剪到这个范数",
    "of the weights, the dropout and the order of windows": "权重、dropout 和窗口顺序的随机种子",
    "GPUs, of which those present are used; cpu; cpu,cpu for two processes there": (
        "GPU 编号，只用存在的；cpu；cpu,cpu 表示在 CPU 上用两个进程"
    ),
    "auto is bf16 where the device multiplies faster in it, else fp32": (
        "auto 表示设备用 bf16 做乘法更快时为 bf16，否则 fp32"
    ),
    "torch.compile; auto is on for GPUs: on a CPU it gains nothing over the code that is there already": (
        "torch.compile；auto 表示在 GPU 上开启；在 CPU 上它不比现有的代码快"
    ),
    "recompute activations in the backward pass: less memory, a third more time": (
        "反向传播时重新计算激活值：内存更少，时间多三分之一"
    ),
    "the same as --precision fp16": "等同于 --precision fp16",
    "with fp16: O0 computes in fp32, O1 in mixed precision with loss scaling, O2 as O1 (apex has another), O3 in "
    "fp16 throughout, which may not converge": (
        "fp16 的级别：O0 用 fp32 计算，O1 为混合精度加损失缩放，O2 同 O1（apex 的不同），O3 全部用 fp16，可能不收敛"
    ),
    "of fp16": "fp16 的后端",
    # generate.py
    "model folder": "模型文件夹",
    "vocabulary of a model folder that has none, such as GPT2-Chinese's": (
        "词表，用于不带词表的模型文件夹，例如 GPT2-Chinese 的"
    ),
    "tokens around a document (default: those that the folder tells)": "文档首尾的 token（默认：文件夹里写的）",
    "auto, cpu, cuda or the number of a GPU": "auto、cpu、cuda 或 GPU 编号",
    "precision of the weights. On a CPU: fp32; bf16, half the memory; int8, a quarter of the memory and the "
    "fastest, but less exact; auto is bf16. On a GPU: fp32 or bf16; auto is the model's own": (
        "权重的精度。CPU 上：fp32；bf16，内存减半；int8，内存为四分之一，最快，但不够精确；auto 为 bf16。GPU 上："
        "fp32 或 bf16；auto 为模型自己的精度"
    ),
    "the text to complete; without it the script asks for texts": "要续写的文本；不写则逐条询问",
    "most tokens of a completion, -1 is n_ctx": "续写的 token 数上限，-1 表示 n_ctx",
    "completions of each text": "每段文本续写几条",
    "completions decoded at once, at most": "同时解码的条数上限",
    "0 is greedy": "温度，0 表示总取概率最大的 token",
    "sample from the k likeliest tokens, 0 is off": "从概率最大的 k 个 token 里采样，0 表示关闭",
    "sample from the likeliest tokens of total probability p, 0 is off": (
        "从概率之和达到 p 的最可能的 token 里采样，0 表示关闭"
    ),
    "above 1 avoids repetition": "重复惩罚，大于 1 时避免重复",
    "keep tokens of at least this share of the likeliest's, 0 is off": (
        "只留概率不低于最大概率这个比例的 token，0 表示关闭"
    ),
    "off the logits of tokens made": "从生成过的 token 的 logit 中减去",
    "the same, each time": "同上，每出现一次减一次",
    "no n-gram of n tokens twice, 0 is off": "同一个 n-gram 不出现两次，0 表示关闭",
    "added to logits of token ids": "加到这些 token ID 的 logit 上",
    "texts that no completion has": "续写里不出现的文本",
    "least tokens of a completion": "续写的 token 数下限",
    "never end a document": "从不结束文档",
    "ids that end it": "遇到这些 token ID 就结束续写",
    "the same seed gives the same completions (default: random)": "种子相同，续写相同（默认：随机）",
    "no two completions of a text are the same (default: on)": "同一段文本的续写互不相同（默认：开启）",
    "end a completion with its first sentence": "续写到第一句结束为止",
    "order the completions by their mean log-probability": "按平均对数概率排序",
    "print the mean log-probability of each completion": "打印每条续写的平均对数概率",
    "decode so many, and give the --nsamples likeliest": "解码这么多条，给出其中概率最大的 --nsamples 条",
    "complete each of these titles, separated by spaces, and write files": "续写每个标题（以空格分隔），写成文件",
    "the same, a title a line": "同上，标题在文件里一行一个",
    "files of each title": "每个标题写几个文件",
    "their folder": "这些文件所在的文件夹",
    "also write samples.txt, replacing an old one": "另存为 samples.txt，覆盖旧文件",
    "folder of samples.txt (default: the current one)": "samples.txt 所在的文件夹（默认：当前文件夹）",
    # server.py
    "model folder; with several of these flags, requests choose a model with their field model (default: "
    "model/final_model)": "模型文件夹；可以重复，请求用字段 model 选择模型（默认：model/final_model）",
    "vocabulary, for a model folder without one (default: the one in the model folder)": (
        "词表，用于不带词表的模型文件夹（默认：模型文件夹里的）"
    ),
    "tokens that begin and end a document (default: those that the model folder tells)": (
        "文档开头和结尾的 token（默认：模型文件夹里写的）"
    ),
    "name of the model in /v1/models and on the web page; one for each --model_path, in the same order (default: "
    "the folder's name)": "模型在 /v1/models 和网页上的名称；每个 --model_path 一个，顺序相同（默认：文件夹名）",
    "auto, cpu, cuda, or the number of a GPU; several, such as 0,1, start one process for each": (
        "auto、cpu、cuda 或 GPU 编号；写多个（如 0,1）则每个设备启动一个进程"
    ),
    "start a model again whose process has died or hangs; with --no-restart the server exits with status 1": (
        "模型进程退出或停滞时重新启动；用 --no-restart 时服务器以状态 1 退出"
    ),
    "seconds without a decode step, while there are requests, after which the model's process is killed": (
        "有请求而没有解码步超过这么多秒，就结束模型进程"
    ),
    "follow a training run: serve each new model_epoch{n} or best_model that appears beside the model folder, or in "
    "it if --model_path is train.py's output folder": (
        "跟随训练：模型文件夹旁边（--model_path 是 train.py 的输出文件夹时则在其中）每出现新的 model_epoch{n} 或 "
        "best_model，就改用它"
    ),
    "address to listen on; 0.0.0.0 is every address of this machine": "监听的地址；0.0.0.0 是本机的全部地址",
    "port to listen on; 0 is any free one": "监听的端口；0 表示任选一个空闲端口",
    "a key that clients must send; repeat it for several keys (default: none)": (
        "客户端必须发送的密钥；可以重复，用于多个密钥（默认：无）"
    ),
    "file with one API key per line; the environment variable GPT2_CHINESE_API_KEY may hold one more key": (
        "一行一个 API 密钥的文件；环境变量 GPT2_CHINESE_API_KEY 也可以有一个"
    ),
    "a key for POST /admin/reload, which exists only if there is one (default: none)": (
        "POST /admin/reload 的密钥，有密钥才有这个接口（默认：无）"
    ),
    "file with one such key per line; the environment variable GPT2_CHINESE_ADMIN_KEY may hold one too": (
        "一行一个这种密钥的文件；环境变量 GPT2_CHINESE_ADMIN_KEY 也可以有一个"
    ),
    "names under which the server is reached, separated by commas; others are answered with 421. * is any. "
    "(default: if --host is an address of this machine alone, its own names; otherwise any)": (
        "服务器接受的主机名，用逗号分隔，其余返回 421；* 表示任意（默认：--host 是仅本机可达的地址时为本机的名字，否"
        "则任意）"
    ),
    "sites whose pages may complete texts from a browser: *, none, or a list such as "
    "https://a.example,https://b.example": (
        "哪些网站的网页可以在浏览器里请求续写：*、none，或 https://a.example,https://b.example 这样的列表"
    ),
    "maximum number of completions per prompt": "一个提示词的续写条数上限",
    "maximum number of tokens per completion": "一条续写的 token 数上限",
    "maximum number of prompts in a request of /v1/completions": "一个 /v1/completions 请求的提示词数上限",
    "maximum size of a request body in bytes": "请求正文的字节数上限",
    "maximum bytes that the answer to a request could have; it is computed before the request is accepted": (
        "一个响应可能达到的字节数上限，受理请求之前就计算"
    ),
    "maximum bytes that the answers to all accepted requests could have together; beyond it requests are answered "
    "with 429": "全部已受理请求的响应合计可能达到的字节数上限，超过则返回 429",
    "seconds in which a client must send its body, and read what is sent to it": (
        "客户端发送请求正文、接收响应的时限（秒）"
    ),
    "seconds until a request is answered with 504": "多少秒之后以 504 回应请求",
    "seconds until a connection without a request is closed": "没有请求的连接多少秒后关闭",
    "maximum number of open connections per process": "每个进程的连接数上限",
    "maximum number of sequences decoded together": "同时解码的序列数上限",
    "megabytes of each model for the keys and values of recent contexts, so that one that begins like them computes "
    "only what is new; at most what the batch takes. On a CPU; 0 keeps none": (
        "每个模型为近期上文的键和值保留的内存（MB），开头相同的上文只计算新的部分；最多与批所用的一样多。用于 CPU；"
        "0 表示不保留"
    ),
    "maximum number of sequences in the queue; when it is full, requests are answered with 429 until an eighth of "
    "it is free": "可以排队的序列数上限；队列满了就返回 429，直到空出八分之一",
    # python -m gpt2_chinese.gguf
    "the model folder": "模型文件夹",
    "the GGUF file to write": "要写的 GGUF 文件",
    "vocabulary of a model folder that has none": "词表，用于不带词表的模型文件夹",
    "of the weight matrices; llama-quantize makes others": "权重矩阵的类型；其他类型用 llama-quantize 转换",
}
"""Help texts of flags, without " (default: …)" where help_formatter.py adds that."""
