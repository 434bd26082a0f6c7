import ApertusCore
import MLX

#if canImport(Darwin)
    import Darwin
#else
    import Glibc
#endif

/// How to draw a token; a temperature of 0 (or below 1e-6) takes the most likely one.
public struct SamplingParameters: Hashable, Sendable {
    /// From 0 to 100.
    public let temperature: Double
    /// The likeliest tokens that reach this mass together stay; above 0, up to 1.
    public let topP: Double
    /// So many tokens stay; 0 keeps all.
    public let topK: Int
    /// Tokens below this share of the likeliest go; from 0 to 1.
    public let minP: Double
    /// Above 1 discourages repetition; from 1e-20 to 100.
    public let repetitionPenalty: Double
    /// Above 0 discourages tokens that have been drawn already; from -2 to 2.
    public let presencePenalty: Double
    /// The same for each time that they were drawn; from -2 to 2.
    public let frequencyPenalty: Double
    /// The same seed gives the same tokens, here and in Python.
    public let seed: UInt64

    /// - Throws: `ApertusError` of kind `usage`: a value outside its range.
    public init(
        temperature: Double = 0.8, topP: Double = 0.9, topK: Int = 0, minP: Double = 0,
        repetitionPenalty: Double = 1, presencePenalty: Double = 0, frequencyPenalty: Double = 0,
        seed: UInt64 = .random(in: 0 ..< 1 << 32)
    ) throws {
        func require(_ name: String, _ value: Double, _ range: ClosedRange<Double>) throws {
            guard range.contains(value) else {
                throw ApertusError(
                    .usage,
                    "--\(name) \(value): expected \(range.lowerBound) to \(range.upperBound)")
            }
        }
        // What is below the smallest normal number of float32 may count as 0 there.
        let smallest = 0x1p-126
        try require("temperature", temperature, 0 ... 100)
        try require("top-p", topP, smallest ... 1)
        try require("top-k", Double(topK), 0 ... 0x1p53)
        if minP != 0 { try require("min-p", minP, smallest ... 1) }
        try require("repetition-penalty", repetitionPenalty, 1e-20 ... 100)
        try require("presence-penalty", presencePenalty, -2 ... 2)
        try require("frequency-penalty", frequencyPenalty, -2 ... 2)
        (self.presencePenalty, self.frequencyPenalty) = (presencePenalty, frequencyPenalty)
        (self.temperature, self.topP, self.topK) = (temperature, topP, topK)
        (self.minP, self.repetitionPenalty, self.seed) = (minP, repetitionPenalty, seed)
    }

    /// Always the most likely token.
    public static let greedy = try! SamplingParameters(temperature: 0, seed: 0)

    /// Whether the most likely token is always taken. At colder temperatures even neighbours in
    /// float32 differ by a factor of 7 or more in probability.
    public var isGreedy: Bool { temperature < 1e-6 || topK == 1 }
}

/// Draws tokens for one sequence; where a GPU computes all stays lazy, so that decoding runs ahead.
///
/// The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p. OpenAI's
/// presence and frequency penalties follow the repetition penalty.
struct Sampler {
    private let parameters: SamplingParameters
    private let sortsOnGPU: Bool
    private var key: MLXArray
    /// 1 for each token that has come, and the tokens' numbers; nil without a penalty.
    private var seen: (marks: MLXArray, numbers: MLXArray)?
    /// How often each token has been drawn, and the tokens' numbers; nil without a penalty.
    private var drawn: (counts: MLXArray, numbers: MLXArray)?

    init(
        _ parameters: SamplingParameters, prompt: [Int], vocabSize: Int,
        sortsOnGPU: Bool = computesOnGPU
    ) {
        (self.parameters, self.sortsOnGPU) = (parameters, sortsOnGPU)
        key = MLXRandom.key(parameters.seed)
        if parameters.presencePenalty != 0 || parameters.frequencyPenalty != 0 {
            drawn = (MLXArray.zeros([vocabSize]), MLXArray(Array(0 ..< vocabSize)))
        }
        guard parameters.repetitionPenalty != 1 else { return }
        var marks = [Float](repeating: 0, count: vocabSize)
        for token in prompt where token < vocabSize { marks[token] = 1 }
        seen = (MLXArray(marks), MLXArray(Array(0 ..< vocabSize)))
    }

    /// Draw a token id, of shape `[]`, by `logits` `[vocabulary]`.
    mutating func callAsFunction(_ logits: MLXArray) -> MLXArray {
        var logits = logits
        if let seen {
            logits = penalize(logits, seen.marks, Float(parameters.repetitionPenalty))
        }
        if let counts = drawn?.counts {
            let often = counts * Float(parameters.frequencyPenalty)
            let present = (counts .> Float(0)).asType(.float32) * Float(parameters.presencePenalty)
            logits = logits.asType(.float32) - often - present
        }
        let token: MLXArray
        if parameters.isGreedy {
            token = argMax(logits, axis: -1)
        } else {
            let (next, now) = MLXRandom.split(key: key)
            key = next
            token = MLXRandom.categorical(
                filtered(logits, parameters, sortsOnGPU: sortsOnGPU), axis: -1, key: now)
        }
        if let (marks, numbers) = seen {
            seen = (maximum(marks, (numbers .== token).asType(.float32)), numbers)
        }
        if let (counts, numbers) = drawn {
            drawn = (counts + (numbers .== token).asType(.float32), numbers)
        }
        return token
    }
}

/// Divide positive and multiply negative logits of `seen` tokens (CTRL, arXiv 1909.05858).
///
/// In float32, whatever the logits are in: float16 ends at 65,504.
func penalize(_ logits: MLXArray, _ seen: MLXArray, _ penalty: Float) -> MLXArray {
    let logits = logits.asType(.float32)
    let changed = which(logits .> Float(0), logits / penalty, logits * penalty)
    return which(seen .> Float(0), changed, logits)
}

/// Scale by temperature and set all but the likely tokens to minus infinity, in float32.
///
/// The largest comes out as 0. It is taken away before the division: what lies near it keeps its
/// digits, and nothing overflows but to a probability of 0.
func filtered(
    _ logits: MLXArray, _ parameters: SamplingParameters, sortsOnGPU: Bool = computesOnGPU
) -> MLXArray {
    var logits = logits.asType(.float32)
    let size = logits.size
    let largest = logits.max(axis: -1)
    if parameters.topK > 0, parameters.topK < size {
        let kth = size - parameters.topK
        let order = argPartition(logits, kth: kth, axis: -1)
        let threshold = logits.take(order[kth ..< kth + 1], axis: 0)
        logits = which(logits .< threshold, -Float.infinity, logits)
    }
    logits = (logits - largest) / Float(parameters.temperature)
    if parameters.topP < 1 {
        let probabilities = softmax(logits, axis: -1)
        let kept = sortsOnGPU
            ? nucleus(probabilities, parameters.topP)
            : nucleus(probabilities.asArray(Float.self), parameters.topP)
        logits = which(kept .> Float(0), logits, -Float.infinity)
    }
    if parameters.minP > 0 {
        logits = which(logits .< Float(log(parameters.minP)), -Float.infinity, logits)
    }
    return logits
}

/// Which tokens are the likeliest that reach `topP` together, 1 or 0 each.
///
/// A token stays if those before it have not yet reached topP; the first always does.
private func nucleus(_ probabilities: MLXArray, _ topP: Double) -> MLXArray {
    let byRank = argSort(-probabilities, axis: -1)
    let likeliest = takeAlong(probabilities, byRank, axis: -1)
    let kept = (likeliest.cumsum(axis: -1) - likeliest .< Float(topP)).asType(.float32)
    return takeAlong(kept, argSort(byRank, axis: -1), axis: -1)
}

/// The same where MLX sorts slowly. Tokens below the bound all fit into the tail together.
private func nucleus(_ probabilities: [Float], _ topP: Double) -> MLXArray {
    let bound = Float((1 - topP) / Double(probabilities.count))
    let candidates = probabilities.indices.filter { probabilities[$0] >= bound }
    let order = candidates.sorted {
        (-probabilities[$0], $0) < (-probabilities[$1], $1)
    }
    var kept = [Float](repeating: 0, count: probabilities.count)
    var sum = 0.0
    for token in order {
        // As the running sum less the token's own share, which is how Python rounds.
        sum += Double(probabilities[token])
        if sum - Double(probabilities[token]) < topP { kept[token] = 1 }
    }
    return MLXArray(kept)
}
