import ApertusCore
import ApertusMLX

/// How an answer is drawn; nil leaves a value to the model's makers, then to this package's
/// defaults.
public struct AnswerOptions: Sendable, Equatable {
    /// Most tokens of the answer, its deliberation included.
    public var maxTokens = 1024
    /// 0 takes the likeliest token each time.
    public var temperature: Double?
    /// Draw from the likeliest tokens that have this share of the probability in all, up to 1.
    public var topP: Double?
    /// Draw from so many likeliest tokens; 0 from all.
    public var topK: Int?
    /// Drop tokens below this share of the likeliest one's probability; 0 drops none.
    public var minP: Double?
    /// Above 1 discourages tokens that prompt or answer have already.
    public var repetitionPenalty: Double?
    /// Above 0 discourages tokens that the answer has already; -2 to 2.
    public var presencePenalty: Double?
    /// The same for each time that they came; -2 to 2.
    public var frequencyPenalty: Double?
    /// The same seed draws the same answer from the same prompt; nil takes one at random.
    public var seed: UInt64?
    /// The answer ends before the first of these texts.
    public var stops: [String] = []

    /// What the model's makers recommend.
    public init() {}

    /// The likeliest token each time: the same prompt gives the same answer.
    public static var greedy: AnswerOptions {
        var options = AnswerOptions()
        options.temperature = 0
        return options
    }

    static let defaultTemperature = 0.8, defaultTopP = 0.9

    /// What was asked for, else what the model's makers recommend, else temperature 0.8 and top-p
    /// 0.9.
    ///
    /// - Throws: `ApertusError` of kind `usage`: a value outside its range.
    func parameters(_ config: GenerationConfig) throws -> SamplingParameters {
        guard maxTokens > 0 else {
            throw ApertusError(.usage, "--max-tokens \(maxTokens): expected 1 or more")
        }
        let isRecommended = config.temperature != nil || config.topP != nil
        let makers = config.doSample == false ? 0 : config.temperature
        return try SamplingParameters(
            temperature: temperature ?? makers ?? Self.defaultTemperature,
            topP: topP ?? config.topP ?? (isRecommended ? 1 : Self.defaultTopP),
            topK: topK ?? config.topK ?? 0, minP: minP ?? config.minP ?? 0,
            repetitionPenalty: repetitionPenalty ?? config.repetitionPenalty ?? 1,
            presencePenalty: presencePenalty ?? 0, frequencyPenalty: frequencyPenalty ?? 0,
            seed: seed ?? UInt64(UInt32.random(in: 0 ... .max)))
    }
}
