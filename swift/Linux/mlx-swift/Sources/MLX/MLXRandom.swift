import CMLXShim

public enum MLXRandom {
    public static func key(_ seed: UInt64) -> MLXArray { MLXArray(mx_random_key(seed)) }
    public static func split(key: MLXArray) -> (MLXArray, MLXArray) {
        var both: [mx_array?] = [nil, nil]
        _ = mx_random_split(key.raw, &both)
        return (MLXArray(both[0]), MLXArray(both[1]))
    }
    public static func categorical(
        _ logits: MLXArray, axis: Int = -1, key: MLXArray
    ) -> MLXArray {
        MLXArray(mx_random_categorical(logits.raw, Int32(axis), key.raw))
    }
}
