import ApertusCore
import MLX

/// Keys or values in several parts, some of them quantized.
enum CachePart {
    case rows(MLXArray)
    case codes(CacheCodes)

    /// Number of positions.
    var length: Int {
        switch self {
        case .rows(let rows): rows.dim(2)
        case .codes(let codes): codes.words.dim(2)
        }
    }
}

/// Everything that is to be attended to, `[B, kvHeads, S, headDim]`.
enum CachedRows {
    case whole(keys: MLXArray, values: MLXArray)
    /// Keys that are `rotated` are to be met by queries rotated alike.
    case parts(keys: [CachePart], values: [CachePart], rotated: Bool)
}

/// Keys and values of one layer for all positions so far.
protocol LayerCache: AnyObject {
    /// Number of positions written so far: the rotary position of the next token.
    var offset: Int { get }
    /// The arrays behind the cache.
    var arrays: [MLXArray] { get }

    /// Append `[B, kvHeads, L, headDim]` and return everything that is to be attended to.
    func update(keys: MLXArray, values: MLXArray) -> CachedRows
    /// The mask for `count` new queries over what `update` will return.
    func mask(count: Int) -> MLXFast.ScaledDotProductAttentionMaskMode
    /// Forget the last `count` positions exactly; false, and no change, where that is impossible.
    func trim(_ count: Int) -> Bool
    /// Prepare for so many positions in all, so that no growing is needed on the way.
    func expect(_ positions: Int)
    /// What `restore` needs, by name.
    func export() -> [String: MLXArray]
    /// What `export` gives after so many positions.
    func exported(
        _ positions: Int, kvHeads: Int, headDim: Int, type: DType
    ) -> [String: ExportedArray]
    /// Take over what a cache of the same form exported after so many positions.
    func restore(_ arrays: [String: MLXArray], positions: Int)
}

/// An array that a cache exports: its shape and type, and whether it may be absent.
struct ExportedArray {
    let shape: [Int]
    let type: DType
    var isOptional = false
}

/// An empty cache of one layer.
func makeLayerCache(_ form: CacheForm, headDim: Int) throws -> any LayerCache {
    try form.requireFit(headDim: headDim)
    guard form.isQuantized else { return FullCache(form) }
    let isPossible = headDim & (headDim - 1) == 0
    return QuantizedCache(
        form, groupSize: try CacheForm.groupSize(headDim: headDim),
        rotated: form.rotates ?? (form.keyBits < CacheForm.fullBits && isPossible))
}

/// A boolean mask `[queries, keys]` of what each query sees.
func maskArray(
    queries: Range<Int>, keys: [Int], _ sees: (_ query: Int, _ key: Int) -> Bool
) -> MLXArray {
    var values: [Bool] = []
    values.reserveCapacity(queries.count * keys.count)
    for query in queries { for key in keys { values.append(sees(query, key)) } }
    return MLXArray(values, [queries.count, keys.count])
}
