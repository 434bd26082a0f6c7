import ApertusCore
import Foundation
import MLX
import Testing

@testable import ApertusMLX

@Suite(.serialized) struct LogitsTests {
    @Test func fixturesAreThere() {
        #expect(
            ModelFixture.all.count > sized(20, 15),
            "APERTUS_FIXTURES names no folder; see Contributing in docs/swift.md")
    }

    @Test(arguments: ModelFixture.all, [DType.float32, .bfloat16])
    func haveTheBitsOfPython(fixture: ModelFixture, type: DType) throws {
        let expected = try fixture.expected()
        let ids = fixture.ids(expected)
        let model = try ApertusModel(folder: fixture.folder, computeType: type)
        let cache = try model.makeCache()
        let prompt = model.logits(model.hidden(MLXArray(ids, [1, ids.count]), cache: cache))
        #expect(bits(prompt) == bits(try #require(expected["\(type).prompt"])))

        let steps = try #require(expected["\(type).steps"])
        var logits = prompt[0, ids.count - 1]
        for step in 0 ..< steps.dim(0) {
            let token = argMax(logits, axis: -1)
            logits = model.nextTokenLogits(token.reshaped([1, 1]), cache: cache)
            #expect(bits(logits) == bits(steps[step]), "step \(step)")
        }
    }

    @Test(arguments: ModelFixture.all)
    func areThoseOfTheEquations(fixture: ModelFixture) throws {
        let expected = try fixture.expected()
        let ids = fixture.ids(expected)
        let model = try ApertusModel(folder: fixture.folder, computeType: .float32)
        let found = model.logits(
            model.hidden(MLXArray(ids, [1, ids.count]), cache: try model.makeCache()))
        let a = found.asArray(Float.self)
        let b = try #require(expected["exact"]).asArray(Float.self)
        #expect(zip(a, b).reduce(0) { max($0, abs($1.0 - $1.1)) } < 2e-5)
    }

    /// As mlx-swift-lm's caches hand it over.
    @Test func anOffsetMayBeAnArray() throws {
        let config = try ModelConfig(folder: ModelFixture(name: "llama3-head-dim").folder)
        let values = (0 ..< 3 * config.headDim).map { sin(Float($0)) }
        let (x, turn) = (MLXArray(values, [1, 1, 3, config.headDim]), Rotary(config))
        #expect(bits(turn(x, offset: MLXArray(17))) == bits(turn(x, offset: 17)))
        #expect(bits(turn(x, offset: 17)) != bits(turn(x, offset: 18)))
    }

    @Test func typeFollowsTheMachine() throws {
        let model = try ApertusModel(folder: ModelFixture(name: "bf16").folder)
        #expect(model.computeType == (computesOnGPU ? .bfloat16 : .float32))
    }
}
