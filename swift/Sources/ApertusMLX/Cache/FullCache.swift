import ApertusCore
import MLX

/// Every position in full precision.
///
/// With a bound, the sinks and the latest positions of the ring behind them; a query then sees,
/// beside the sinks, itself and the `ring - 1` positions before it.
final class FullCache: LayerCache {
    private let form: CacheForm
    private let store: Store

    init(_ form: CacheForm) {
        self.form = form
        store = form.bound.map { Ring(size: $0, kept: form.sinks) } ?? Store()
    }

    var offset: Int { store.length }
    var arrays: [MLXArray] { store.arrays }

    func update(keys: MLXArray, values: MLXArray) -> CachedRows {
        let rows = store.append([keys, values], keepEvicted: keys.dim(2) > 1)
        return .whole(keys: rows[0], values: rows[1])
    }

    func mask(count: Int) -> MLXFast.ScaledDotProductAttentionMaskMode {
        guard count > 1 else { return .none }
        guard let bound = form.bound, let ring = form.ring, offset + count > bound else {
            return .causal
        }
        return .array(
            maskArray(queries: offset ..< offset + count, keys: store.numbers(count)) {
                query, key in key <= query && (key > query - ring || key < form.sinks)
            })
    }

    func trim(_ count: Int) -> Bool {
        guard count <= offset, store.canShrink(offset - count) else { return false }
        store.shrink(offset - count)
        return true
    }

    func expect(_ positions: Int) { store.expected = positions }

    func export() -> [String: MLXArray] { ["rows": concatenated(store.rows(), axis: 1)] }

    func exported(
        _ positions: Int, kvHeads: Int, headDim: Int, type: DType
    ) -> [String: ExportedArray] {
        let held = min(positions, form.bound ?? positions)
        return ["rows": ExportedArray(shape: [1, 2 * kvHeads, held, headDim], type: type)]
    }

    func restore(_ arrays: [String: MLXArray], positions: Int) {
        let (keys, values) = halves(arrays["rows"]!)
        store.restore([keys, values], length: positions)
    }
}

/// Keys and values of rows `[B, 2 * kvHeads, S, headDim]` that hold both, keys first.
func halves(_ rows: MLXArray) -> (MLXArray, MLXArray) {
    let heads = rows.dim(1) / 2
    return (rows[0..., 0 ..< heads], rows[0..., heads...])
}
