#!/usr/bin/env bash
# What only a GPU can show, in one command of at most nine minutes: the tests marked gpu; GPT-2 small trained in bf16 and
# fp16, stopped, resumed, sampled from and served; training throughput beside nanoGPT and the Trainer with MFU; decoding
# beside transformers. The lines for RESULTS.md are in OUT/table.md, what each step printed in OUT/STEP.log.
#
#   benchmarks/on_gpu.sh prepare KIT [CORPUS.txt]    where the environments are: what a bare GPU machine lacks, 30 MB
#   benchmarks/on_gpu.sh run KIT OUT                 on the GPU machine: python3 with torch and transformers, no network
#   DEVICE=cpu benchmarks/on_gpu.sh run KIT OUT      a rehearsal without a GPU: tiny sizes
#
# prepare: NANOGPT is a checkout of nanoGPT, PYTHON_VERSION that of the GPU machine's Python (default 3.12).
# run: STEPS chooses among "tests bf16 fp16 throughput decoding divergence", SECONDS_IN_ALL is the limit (default 540).
set -u
cd "$(dirname "$0")/.."

prepare() {
    local kit=$1 corpus=${2:-data/daily_health_qa.txt} vocab=.venv-vocab/bin/python train=.venv-train/bin/python
    set -e
    mkdir -p "$kit/wheels" "$kit/texts"
    cp "$corpus" "$kit/texts/"
    $vocab build_trainfile.py --data_path "$kit/texts" --output_path "$kit/train.json"
    $vocab make-vocab.py --raw_data_path "$kit/train.json" --vocab_file "$kit/vocab.txt" --vocab_size 5000
    $train make-tokenized.py --raw_data_path "$kit/train.json" --vocab_filename "$kit/vocab.txt" \
        --tokenized_data_path "$kit/tokenized" --min_length 50
    rm -r "$kit/texts" "$kit/train.json" "$kit"/tokenized/.[!.]* 2>/dev/null || true
    # The segmenter reads these files of the thulac package's model and imports nothing of it.
    tar -C "$($train -c 'import thulac, pathlib; print(pathlib.Path(thulac.__file__).parent.parent)')" -cJf \
        "$kit/thulac.tar.xz" thulac/models/{cws_dat.bin,cws_label.txt,cws_model.bin,ns.dat,idiom.dat,singlepun.dat}
    $train -m pip download --quiet --no-deps --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" \
        --platform manylinux_2_17_x86_64 -d "$kit/wheels" "$(grep aiohttp_cors requirements-train.txt)"
    if [ -n "${NANOGPT:-}" ]; then mkdir -p "$kit/nanogpt" && cp "$NANOGPT/model.py" "$kit/nanogpt/"; fi
    du -sh "$kit"
}

# ---------------------------------------------------------------------------------------------------------------------

started=$SECONDS
remaining() { echo $((${SECONDS_IN_ALL:-540} - SECONDS + started)); }

# step NAME LIMIT COMMAND...: runs it for LIMIT seconds at most, and never longer than is left of all.
step() {
    local name=$1 limit=$2 begun=$SECONDS status
    shift 2
    [ "$limit" -lt "$(remaining)" ] || limit=$(remaining)
    [ "$limit" -gt 5 ] || { echo "| $name | no time was left | |" >>"$out/table.md" && return 1; }
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    echo "--- $name: status $status after $((SECONDS - begun)) s (limit $limit)"
    tail -n "${LINES_SHOWN:-25}" "$out/$name.log" | cut -c1-220
    [ $status -eq 0 ] || echo "| $name | **status $status** after $((SECONDS - begun)) s | see $name.log |" >>"$out/table.md"
    return $status
}

wanted() { [[ " ${STEPS:-tests bf16 fp16 throughput decoding divergence} " == *" $1 "* ]]; }

tests() {
    local parallel=()
    python3 -c 'import xdist' 2>/dev/null && parallel=(-n 4)
    step tests 200 python3 -m pytest -W default -p no:cacheprovider "${parallel[@]}" -m gpu --durations=8 "$gpu_tests"
    echo "| tests marked gpu | $(tail -n 1 "$out/tests.log" | tr -d '=') | |" >>"$out/table.md"
}

# One precision: a run is stopped after so many seconds, goes on, and is sampled from and served.
training() {
    local name=$1 folder=$scratch/$1
    local command=(python3 train.py --tokenized_data_path "$kit/tokenized" --vocab_file "$kit/vocab.txt"
        --model_config "$shape" --precision "$name" --device "$device" --output_dir "$folder" --writer_dir "$folder/tb"
        --epochs 100 --max_steps "$updates" --save_steps 20 --batch_size 16 --lr 6e-4 --log_step 10 --sample_prompts 孩子)
    "${command[@]}" >"$out/$name.part1.log" 2>&1 &
    local process=$!
    for _ in $(seq 900); do  # until it has saved
        sleep 0.2
        compgen -G "$folder/checkpoints/step_*" >/dev/null && break
        kill -0 $process 2>/dev/null || break
    done
    kill -TERM $process 2>/dev/null
    wait $process
    echo "stopped with status $? (143 is right)" >>"$out/$name.part1.log"
    step "$name" 170 "${command[@]}" --resume
    local rate
    rate=$(tr '\r' '\n' <"$out/$name.log" | grep -o 'epoch [0-9]* of.*tokens/s' | tail -n 1)
    echo "| train.py in $name, stopped and resumed, beside the other steps | ${rate:-no epoch} | $(tr '\r' '\n' \
        <"$out/$name.log" | grep -o 'validation loss.*' | tail -n 1) |" >>"$out/table.md"
    step "$name.generate" 60 python3 generate.py --model_path "$folder/final_model" --device "$device" --prefix 孩子 \
        --nsamples 3 --length 40 --seed 1
    [ "$name" = bf16 ] || return 0
    step "$name.server" 90 python3 examples/ask_server.py --model_path "$folder/final_model" --context 孩子
}

throughput() {
    local nanogpt=()
    [ -d "$kit/nanogpt" ] && nanogpt=(--nanogpt "$kit/nanogpt")
    step throughput 200 python3 benchmarks/training.py throughput --shapes "$shapes" "${nanogpt[@]}" --rounds 5 --steps "$steps"
    grep -E 'tokens/s' "$out/throughput.log" | sed -E 's/^ */| /; s/ {2,}/ | /; s/; / | /; s/$/ |/' >>"$out/table.md"
}

decoding() {
    step decoding 200 python3 benchmarks/generation.py --device "${device/#[0-9]*/cuda}" --rounds 3 $generation
    # Of each line of figures the median; the titles and the ratios as they are.
    grep -E '^(5 samples|latency|32 requests|(transformers generate|CTranslate2|ours|loop without).*s$|.*[0-9]s +[0-9.]+s +[0-9]+$|ours.*times)' \
        "$out/decoding.log" | sed -E 's/ +[0-9.]+s +([0-9.]+s) +([0-9]+)$/ | \1 | \2 tokens\/s/; s/: ([0-9.]+ times)/ | \1/; s/^/| /; s/$/ |/' \
        >>"$out/table.md"
}

# On 2026-11-27 GPT-2 small in bf16, compiled, with dropout diverged at this learning rate; not compiled it did not.
divergence() {
    local compile folder
    for compile in off on; do
        folder=$scratch/divergence_$compile
        step "divergence.compile_$compile" 150 python3 train.py --tokenized_data_path "$kit/tokenized" \
            --vocab_file "$kit/vocab.txt" --model_config "$shape" --precision bf16 --compile "$compile" --dropout 0.1 \
            --device "$device" --output_dir "$folder" --writer_dir "$folder/tb" --epochs 100 --max_steps $((updates / 2)) \
            --val_steps 25 --batch_size 16 --lr 6e-4 --log_step 10
        echo "| bf16 with dropout, compile $compile | $(tr '\r' '\n' <"$out/divergence.compile_$compile.log" |
            grep -o 'update [0-9,]*: validation loss [0-9.]*' | tail -n 3 | tr '\n' ';') | |" >>"$out/table.md"
    done
}

run() {
    kit=$(realpath "$1") out=$2
    mkdir -p "$out" && out=$(realpath "$out")
    scratch=$(mktemp -d) device=0 updates=500 shape=config/model_config_small.json shapes=small-gpu steps=10 generation=
    if [ "${DEVICE:-0}" = cpu ]; then
        device=cpu updates=60 shape=config/model_config_test.json shapes=tiny steps=2 generation="--layers 1 --tokens 5"
        export OMP_NUM_THREADS=1  # several steps at once on few processors wait for each other otherwise
    fi
    gpu_tests=$(grep -rl 'mark.gpu,' tests --include='test_*.py')
    export PYTHONPATH="$scratch/site" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
    mkdir -p "$scratch/site"
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$scratch/site" "$kit"/wheels/*.whl
    tar -C "$scratch/site" -xJf "$kit/thulac.tar.xz" && touch "$scratch/site/thulac/__init__.py"
    python3 - >"$out/table.md" <<'PYTHON'
import platform, torch, transformers, numpy
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"no GPU, {torch.get_num_threads()} threads"
print(f"{gpu}; Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
      f"numpy {numpy.__version__}\n\n| what | | |\n|---|---|---|")
PYTHON
    # What is not timed shares the machine; what is timed has it alone.
    for name in tests bf16 fp16; do
        if wanted $name; then
            if [ $name = tests ]; then tests & else training $name & fi
        fi
    done
    wait
    for name in throughput decoding divergence; do
        if wanted $name; then $name; fi
    done
    rm -rf "$scratch"
    echo "in all $((SECONDS - started)) s"
    cat "$out/table.md"
}

case "${1:-}" in
    prepare) shift && prepare "$@" ;;
    run) shift && run "$@" ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
