// Exports the C ABI: a context, which has its threads and the kernels of one instruction set, and
// each kernel by itself. program.cpp runs many kernels in one call.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "context.h"

namespace {

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512vbmi");
}

// Asks the kernel for the tile registers, which it gives to a process that wants them. It refuses
// where the processor has none, or where a thread's stack for signals is too small for them.
bool has_amx() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
    constexpr unsigned kAll = kBf16 | kTile | kInt8;
    if ((edx & kAll) != kAll) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

int best_isa() {
    if (has_avx512()) return has_amx() ? 3 : 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
}

reef::Kernels kernels_of(int isa) {
    if (isa == 3) return avx512::with_amx(avx512::table);
    return isa == 2 ? avx512::table : avx2::table;
}

}  // namespace

extern "C" {

// Returns the best instruction set of this machine: 3 amx (avx512, and tiles of int8 and bf16),
// 2 avx512 (bf16, VNNI), 1 avx2, 0 none of them.
int reef_best_isa() {
    static const int best = best_isa();
    return best;
}

// Opens a context, or returns null where this machine lacks the instruction set.
ReefContext* reef_open(int isa, int threads) {
    if (isa < 1 || isa > reef_best_isa() || threads < 1) return nullptr;
    return new ReefContext(kernels_of(isa), threads);
}

void reef_close(ReefContext* context) { delete context; }

void reef_linear(ReefContext* context, const ReefLinearArgs* args) {
    context->run(context->kernels.linear_prepare, args);
    context->run(context->kernels.linear, args);
}

void reef_lora(ReefContext* context, const ReefLoraArgs* args) {
    ReefLoraArgs all = *args;
    all.threads = context->pool.threads();
    const reef::Kernels& kernels = context->kernels;
    reef::Task tasks[] = {kernels.lora_expand(&all, all.threads),
                          kernels.lora_shrink(&all, all.threads)};
    tasks[0].waits = true;
    context->pool.run(tasks, 2);
}

// Expands what args->h already holds.
void reef_lora_expand(ReefContext* context, const ReefLoraArgs* args) {
    ReefLoraArgs all = *args;
    all.threads = context->pool.threads();
    context->run(context->kernels.lora_expand, &all);
}

void reef_plain(ReefContext* context, const ReefPlainArgs* args) {
    context->run(context->kernels.plain_shrink, args);
    context->run(context->kernels.plain_expand, args);
}

void reef_store(ReefContext* context, const ReefStoreArgs* args) {
    context->run(context->kernels.store, args);
}

void reef_attention(ReefContext* context, const ReefAttentionArgs* args) { context->attend(*args); }

void reef_embed(ReefContext* context, const ReefEmbedArgs* args) {
    context->run(context->kernels.embed, args);
}

void reef_norm(ReefContext* context, const ReefNormArgs* args) {
    context->run(context->kernels.norm, args);
}

void reef_gate(ReefContext* context, const ReefGateArgs* args) {
    context->run(context->kernels.gate, args);
}

void reef_gather(ReefContext* context, const ReefGatherArgs* args) {
    context->run(context->kernels.gather, args);
}

void reef_greedy(ReefContext* context, const ReefGreedyArgs* args) {
    context->run(context->kernels.greedy, args);
}

void reef_draw(ReefContext* context, const ReefDrawArgs* args) {
    context->run(context->kernels.draw, args);
}

}  // extern "C"
