import ApertusCore
import MLX

/// MLX's matrix kernels work on tiles of 32 or 64 rows, and with fewer are slower than their share.
private let minChunk = 64

/// How a prompt of `length` tokens is cut into chunks of up to `step`.
///
/// The last one gets at least 64 tokens from the one before, if there is one.
func chunkSizes(_ length: Int, step: Int) -> [Int] {
    let (full, rest) = length.quotientAndRemainder(dividingBy: step)
    var sizes = Array(repeating: step, count: full) + (rest > 0 ? [rest] : [])
    if full > 0, rest > 0, rest < minChunk, minChunk <= step / 2 {
        sizes.replaceSubrange((full - 1)..., with: [step + rest - minChunk, minChunk])
    }
    return sizes
}

/// Run `ids` through the model in chunks of up to `step` tokens.
///
/// - Parameter onChunk: is told the number of tokens done after each chunk; what it throws ends the
///   run there, with the cache holding so many.
/// - Returns: the logits `[vocabulary]` after the last token.
func prefill(
    _ model: ApertusModel, _ ids: [Int], cache: [any LayerCache], step: Int,
    onChunk: (Int) throws -> Void
) throws -> MLXArray {
    for layer in cache { layer.expect(layer.offset + ids.count) }
    var (done, logits): (Int, MLXArray?) = (0, nil)
    for size in chunkSizes(ids.count, step: step) {
        let chunk = MLXArray(Array(ids[done ..< done + size]), [1, size])
        try catchingMLX("reading the prompt") {
            // Only the caches and the last logits are wanted; hidden states of a chunk are not.
            if done + size == ids.count {
                logits = model.nextTokenLogits(chunk, cache: cache)
            } else {
                _ = model.hidden(chunk, cache: cache)
            }
            eval(cache.flatMap(\.arrays) + (logits.map { [$0] } ?? []))
        }
        done += size
        Memory.clearCache()
        try onChunk(done)
    }
    return logits!
}
