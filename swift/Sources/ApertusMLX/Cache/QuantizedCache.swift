import ApertusCore
import MLX

/// Quantized keys and values, with the sinks and the latest positions in full precision.
///
/// After N positions, S sinks and a window of W, the first f(N) = floor((N - S - W) / 32) * 32
/// positions after the sinks are codes, all others full precision. A query at position i sees what
/// stands after i + 1 positions, also inside a chunk: so results do not depend on the chunking.
/// With a bound, the codes are a ring of Q positions: the query sees those from f(i + 1) - Q on.
final class QuantizedCache: LayerCache {
    private let form: CacheForm
    private let groupSize: Int
    private let rotated: Bool
    private(set) var offset = 0
    private let older: Store
    /// Sinks and latest positions `[B, 2 * kvHeads, S, headDim]`, in the order of positions.
    private var recent: MLXArray?
    /// The last block that was quantized, so that at least its length can be rewound exactly.
    private var departed: MLXArray?

    init(_ form: CacheForm, groupSize: Int, rotated: Bool) {
        (self.form, self.groupSize, self.rotated) = (form, groupSize, rotated)
        older = form.ring.map { Ring(size: $0) } ?? Store()
    }

    var arrays: [MLXArray] { [recent, departed].compactMap { $0 } + older.arrays }

    func update(keys: MLXArray, values: MLXArray) -> CachedRows {
        let count = keys.dim(2)
        var seen = withRecent(
            concatenated([rotated ? hadamardTransform(keys) : keys, values], axis: 1))
        let leaving = leaving(count)
        offset += count
        var codes = older.rows()
        if leaving > 0 {
            let sinks = form.sinks
            let block = seen[.ellipsis, sinks ..< sinks + leaving, 0...]
            codes = older.append(quantized(block), keepEvicted: count > 1)
            // A copy: the slice would keep all of a long chunk alive.
            departed = block.take(
                MLXArray(Array(leaving - CacheForm.step ..< leaving)), axis: 2)
            recent = padded([
                seen[.ellipsis, 0 ..< sinks, 0...], seen[.ellipsis, (sinks + leaving)..., 0...],
            ])
            if count == 1 { seen = recent![.ellipsis, 0 ..< held, 0...] }
        }
        return segments(codes, seen)
    }

    func mask(count: Int) -> MLXFast.ScaledDotProductAttentionMaskMode {
        guard count > 1 else { return .none }
        let leaving = leaving(count)
        guard older.length + leaving > 0 else { return .causal }
        let (start, sinks) = (offset, form.sinks)
        // Keys of codes as they are, those of rows in full precision below zero.
        let codes = older.numbers(leaving)
        let live = Array(0 ..< min(sinks, start + count))
            + Array(sinks + older.length ..< start + count)
        let keys = codes + live.map { -1 - $0 }
        return .array(
            maskArray(queries: start ..< start + count, keys: keys) { query, key in
                let flushed = form.flushed(query + 1)
                if key >= 0 {
                    return key < flushed && key >= flushed - (form.ring ?? flushed)
                }
                let position = -1 - key
                return position <= query && (position < sinks || position >= sinks + flushed)
            })
    }

    func trim(_ count: Int) -> Bool {
        let target = offset - count
        guard target >= 0, canReturn(to: target) else { return false }
        if let recent, target > form.sinks, older.length > form.flushed(target) {
            let rows = recent[.ellipsis, 0 ..< held, 0...]
            self.recent = padded([
                rows[.ellipsis, 0 ..< form.sinks, 0...], departed!,
                rows[.ellipsis, form.sinks..., 0...],
            ])
            departed = nil
        }
        older.shrink(form.flushed(target))
        offset = target
        return true
    }

    func expect(_ positions: Int) { older.expected = form.flushed(positions) }

    func export() -> [String: MLXArray] {
        var arrays = Dictionary(uniqueKeysWithValues: zip(names, older.rows()))
        if let recent, held > 0 { arrays["recent"] = recent[.ellipsis, 0 ..< held, 0...] }
        if older.length > 0 { arrays["departed"] = departed }
        return arrays
    }

    func exported(
        _ positions: Int, kvHeads: Int, headDim: Int, type: DType
    ) -> [String: ExportedArray] {
        let flushed = form.flushed(positions)
        func array(
            _ heads: Int, _ held: Int, _ width: Int, _ type: DType, isOptional: Bool = false
        ) -> ExportedArray {
            .init(shape: [1, heads, held, width], type: type, isOptional: isOptional)
        }
        var all: [String: ExportedArray] = [:]
        if positions > flushed {
            all["recent"] = array(2 * kvHeads, positions - flushed, headDim, type)
        }
        guard flushed > 0 else { return all }
        // A rewind has taken it back.
        all["departed"] = array(2 * kvHeads, CacheForm.step, headDim, type, isOptional: true)
        let held = min(flushed, form.ring ?? flushed)
        let stored: DType = type == .float32 ? .bfloat16 : type
        for (name, bits) in [("keys", form.keyBits), ("values", form.valueBits)] {
            if bits == CacheForm.fullBits {
                all[name] = array(kvHeads, held, headDim, type)
                continue
            }
            all["\(name).words"] = array(kvHeads, held, headDim * bits / 32, .uint32)
            for part in ["scales", "biases"] {
                all["\(name).\(part)"] = array(kvHeads, held, headDim / groupSize, stored)
            }
        }
        return all
    }

    func restore(_ arrays: [String: MLXArray], positions: Int) {
        older.restore(names.compactMap { arrays[$0] }, length: form.flushed(positions))
        recent = arrays["recent"].map { padded([$0]) }
        departed = arrays["departed"]
        offset = positions
    }

    /// Names of the arrays of `older`.
    private var names: [String] {
        [("keys", form.keyBits), ("values", form.valueBits)].flatMap { name, bits in
            (bits == CacheForm.fullBits ? [""] : [".words", ".scales", ".biases"]).map { name + $0 }
        }
    }

    /// Rows of `recent` that are in use.
    private var held: Int { offset - form.flushed(offset) }

    private var room: Int { form.sinks + form.window + CacheForm.step }

    /// Positions that will be quantized when `count` more have come.
    private func leaving(_ count: Int) -> Int { form.flushed(offset + count) - older.length }

    private func canReturn(to target: Int) -> Bool {
        let flushed = form.flushed(target)
        if target <= form.sinks || flushed == older.length { return true }
        return older.length - flushed <= departed?.dim(2) ?? 0 && older.canShrink(flushed)
    }

    /// All rows in full precision, `rows` last; in place where there is room for them.
    private func withRecent(_ rows: MLXArray) -> MLXArray {
        let (held, count) = (held, rows.dim(2))
        let recent = recent ?? MLXArray.zeros(
            [rows.dim(0), rows.dim(1), room, rows.dim(3)], dtype: rows.dtype)
        self.recent = recent
        if held + count > room {
            return concatenated([recent[.ellipsis, 0 ..< held, 0...], rows], axis: 2)
        }
        recent[.ellipsis, held ..< held + count, 0...] = rows
        return recent[.ellipsis, 0 ..< held + count, 0...]
    }

    /// `parts` one after the other in a new array of fixed length.
    private func padded(_ parts: [MLXArray]) -> MLXArray {
        var parts = parts
        let missing = room - parts.reduce(0) { $0 + $1.dim(2) }
        if missing > 0, let like = parts.first {
            parts.append(
                MLXArray.zeros([like.dim(0), like.dim(1), missing, like.dim(3)], dtype: like.dtype))
        }
        return concatenated(parts, axis: 2)[.ellipsis, 0 ..< room, 0...]
    }

    /// The arrays that `older` keeps of `block` `[B, 2 * kvHeads, L, headDim]`.
    private func quantized(_ block: MLXArray) -> [MLXArray] {
        let (keys, values) = halves(block)
        return [(keys, form.keyBits), (values, form.valueBits)].flatMap { rows, bits in
            if bits == CacheForm.fullBits { return [rows] }
            let codes = CacheCodes(quantizing: rows, bits: bits, groupSize: groupSize)
            return [codes.words, codes.scales, codes.biases]
        }
    }

    private func segments(_ older: [MLXArray], _ recent: MLXArray) -> CachedRows {
        let (keys, values) = halves(recent)
        var rest = older[...]
        func part(_ bits: Int) -> [CachePart] {
            guard !rest.isEmpty else { return [] }
            if bits == CacheForm.fullBits { return [.rows(rest.removeFirst())] }
            let (words, scales) = (rest.removeFirst(), rest.removeFirst())
            return [
                .codes(CacheCodes(
                    words: words, scales: scales, biases: rest.removeFirst(), bits: bits,
                    groupSize: groupSize))
            ]
        }
        let coded = (part(form.keyBits), part(form.valueBits))
        return .parts(
            keys: coded.0 + [.rows(keys)], values: coded.1 + [.rows(values)], rotated: rotated)
    }
}
